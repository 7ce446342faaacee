"""The first norm: gradients as backward left them, before a clip that comes ahead of gradwatch's own look."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from ..records import Floats
from ..stats import GradientPieces, Gradients, Row, Shards, host_norms, measure_pieces
from ..torchside import Aside, OwnedHook, StandIn, are_modes_on, graph_task_id, sent, untraced, weakly
from ._between import Between
from ._guard import Guard
from ._model_meter import ModelMeter
from ._paths import Watched
from ._seals import Seals
from ._timed import calm_numpy

__all__ = ["CADENCE", "Look", "Produced", "look_at"]

_PART = "norms before a clip of the program's own"
# The way in which DDP and FSDP learn that a backward is over.
_call_at_end: Callable[[Callable[[], Any]], None] = torch.autograd.Variable._execution_engine.queue_callback
_IS_CPU = attrgetter("is_cpu")
_WINDOWS = 8
CADENCE = 16
"""Records from one measurement to the next where nothing tells that gradients were changed."""


@dataclass
class Look:
    """What was seen when a backward was over.

    Attributes:
        params: that had a gradient.
        seals: of these gradients.
        row: norms of each, still multiplied by a loss scale; None where the host has found them by one call.
        on_host: then, with the norm of all.
        counted: with details and histograms; None where they are not due.
    """

    params: Sequence[Tensor]
    seals: Seals
    row: Row | None = None
    on_host: tuple[Floats, float] | None = None
    counted: GradientPieces | None = None

    def holds(self, params: Sequence[Tensor], tensors: Sequence[Tensor] | None = None) -> bool:
        """Whether the gradients of these parameters are the very ones, untouched.

        Args:
            params: that have a gradient.
            tensors: these gradients, where somebody has just listed them.
        """
        same = self.params is params
        if not same and not (len(self.params) == len(params) and all(map(is_, self.params, params))):
            return False
        return not (self.seals.broken if tensors is None else self.seals.are_broken_by(tensors))

    def pieces(self, grads: Gradients, *, histograms: bool = False) -> GradientPieces:
        """Return what measuring them anew would."""
        if not histograms:
            return GradientPieces(Shards(grads.tensors), None, None, self.norms)
        if self.counted is None:
            return grads.pieces(histograms=True, known=self.norms)
        return replace(self.counted, shards=Shards(grads.tensors))

    @property
    def norms(self) -> Row:
        """The norms, wherever they were found."""
        if self.row is None:
            assert self.on_host is not None
            self.row = Row(torch.from_numpy(self.on_host[0]))
        return self.row

    def of(self, grads: Gradients, scale: float) -> Tensor | None:
        """Return the norms of these parameters' gradients as they were then, free of the loss scale; None where they
        are other parameters."""
        norms = self.norms.tensor
        norms = norms if scale == 1 else norms / scale
        places = {id(p): i for i, p in enumerate(self.params)}
        mine = [places.get(id(p), -1) for p in grads.params]
        if not mine or -1 in mine:
            return None
        if mine == list(range(len(norms))):
            return norms
        return norms.index_select(0, sent(torch.tensor(mine), norms.device))


def look_at(params: Iterable[nn.Parameter]) -> Look | None:
    """Return what is to be seen of the gradients of these parameters now."""
    with Aside():
        return _seen(Gradients.collect([(str(i), p) for i, p in enumerate(params)]))


def _seen(grads: Gradients) -> Look | None:
    """Return what is to be seen of gradients; None where there are none, or they lie in pieces."""
    # Where that is done on the host nothing is launched.
    found = grads.measure_on_host()
    if found is not None:
        params = grads.params
        return Look(params, Seals(params, found[2]), None, found[:2])
    return _seen_elsewhere(grads)


@calm_numpy
def _counted(params: Sequence[nn.Parameter], tensors: list[Tensor]) -> Look | None:
    """Return what is to be seen of gradients on the host with details and histograms, by one read; None where some lie
    elsewhere, or in pieces."""
    if not all(map(_IS_CPU, tensors)):
        return None
    with Aside():
        pieces = measure_pieces(tensors, histograms=True, of=params)
    if pieces.shards.groups or pieces.shards.unstored:
        return None
    # Not the pieces themselves: they would keep the gradients.
    return Look(params, Seals(params, tensors), pieces.row, None, replace(pieces, shards=Shards([])))


@calm_numpy
def _seen_elsewhere(grads: Gradients) -> Look | None:
    if not len(grads) or _is_capturing(grads.device):
        return None
    pieces = grads.pieces()
    return None if pieces.shards.groups else Look(grads.params, Seals(grads.params), pieces.row)


class Produced:
    """Looks at gradients at the end of a step's last backward, so that a clip ahead of gradwatch's look hides nothing.

    A hook on a few parameters tells that a backward runs, and autograd is asked to call back when it is over: after the
    reduction over ranks, which was queued in the same backward. Of several backwards in a step the first ones are
    passed over, as many as no recent step did without. Where nobody touched the gradients in between, the look is the
    step's measurement, and costs nothing more. Not for gradients in pieces, whose norms need all ranks.

    Attributes:
        counts: details and histograms are due at this step, and this look is its measurement where nobody touches the
            gradients.
        between: tells what was done in between.
        task: torch's number of the backward that runs; -1 where none was heard of.
    """

    def __init__(self, meter: ModelMeter, guard: Guard, is_due: Callable[[], bool]) -> None:
        self._meter, self._guard, self._is_due = meter, guard, is_due
        self.counts = False
        self._handles: list[Any] = []
        self._of: Watched | None = None
        self._hears_all = False
        self.task = -1
        self._open: object | None = None
        self._num_over, self._is_counted = 0, False
        self._counts: deque[int] = deque(maxlen=_WINDOWS)
        self._look: Look | None = None
        self._age = 0
        self._told_over = weakly(self._over)
        self.between = Between()
        self.listen()

    def listen(self) -> None:
        """Put the hooks on the parameters that are watched now."""
        watched = self._meter.watched
        if self._of is watched:
            return
        self.close()
        self._of = watched
        with self._guard(_PART, self.close):
            for p in self._chosen():
                if p.requires_grad and p.is_leaf and not isinstance(p, (nn.parameter.UninitializedParameter, StandIn)):
                    self._handles.append(_Bell(self).hang(p.register_post_accumulate_grad_hook))
                    self._meter.account.heard.add(id(p))

    def _chosen(self) -> Sequence[Tensor]:
        """Return the first and the last parameter of each group, which most backwards reach; or all."""
        watched = self._meter.watched
        if watched.is_in_pieces:
            return ()
        if self._hears_all or len(watched.held) <= 2:
            return watched.held
        mine = {id(p) for p in watched.held}
        groups = [g["params"] for o in self._meter.optimizers for g in o.param_groups]
        named = [[p for p in group if id(p) in mine and p.requires_grad] for group in groups]
        return list({id(p): p for group in named if group for p in (group[0], group[-1])}.values())

    def hear(self, task: int) -> None:
        """A parameter has got its gradient, the first one in this backward."""
        token = self._open = object()
        self.task, self._look = task, None
        # Twice around: those who queued theirs during this backward (DDP's reduction) come before the second.
        _call_at_end(partial(_call_at_end, partial(self._told_over, token)))

    def _over(self, token: object) -> None:
        self.task = -1
        self._num_over += 1
        if self._open is not token:
            return  # measured already
        self._open = None
        if self._num_over < min(self._counts, default=1) or _PART in self._guard.failed:
            return
        if self._meter.options.every != 1 and not self._is_due():
            return
        try:
            if are_modes_on():
                with Aside():
                    self._see()
            else:
                self._see()
        except Exception as error:
            self._guard.report(_PART, error)
            self.close()

    def _see(self) -> None:
        meter, self._age = self._meter, 0
        tensors, held = meter.all_gradients(), meter.watched.held
        if tensors is not None and self.counts and (counted := _counted(held, tensors)) is not None:
            self._look = counted
            return
        lent = None if tensors is None else meter.watched.lender.lend(tensors)
        if tensors is not None and lent is not None and (found := host_norms(tensors, lent)) is not None:
            self._look = Look(held, Seals(held, tensors, lent[0]), None, found)
            return
        with Aside():
            grads = meter.gradients(meter.optimizers, 1.0)
            self._look = _seen(grads)
        if self._look is None and Shards(grads.tensors).groups:
            self.close()

    def give(self, look: Look | None) -> None:
        """Take what was seen before this was there."""
        self._look, self._age = look, 0

    def take(self, grads: Gradients) -> Look | None:
        """Return what was seen at the end of the step's last backward; None where one runs, or none was heard."""
        is_open, self._open = self._open is not None, None
        count = self._num_over + is_open
        if count:
            if not self._is_counted:
                self._counts.append(count)
            self._is_counted = True
        elif len(grads) and self._handles and not self._hears_all and self._look is None:
            # It reached none of the parameters that were thought to tell.
            self._hears_all, self._of = True, None
            self.listen()
        return None if is_open else self._look

    def is_to_compare(self, step: int) -> bool:
        """Whether gradients are to be measured again though nothing shows that they were changed."""
        return not self.between.writes_show or (step // self._meter.options.every) % CADENCE == 0

    def pass_over(self) -> None:
        """Say that a step comes which is not measured."""
        self._open = self._look = None

    def stepped(self) -> None:
        """Say that an optimizer has stepped: backwards are counted from there."""
        self._num_over, self._is_counted, self.counts = 0, False, False

    def settle(self) -> None:
        """Say that a step is over. Several optimizers may step, one by one, after one backward."""
        self._age += 1
        if self._age >= len(self._meter.optimizers):
            self._look = None

    def void(self) -> None:
        """Say that gradwatch itself has changed gradients since."""
        self._open = self._look = None

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._meter.account.heard.clear()
        self._handles, self._look, self._open, self.task = [], None, None, -1


class _Bell(OwnedHook):
    """Tells of a backward, at a parameter that has got its gradient: asked at every step, it does nothing else."""

    __slots__ = ()

    @untraced
    def __call__(self, param: Tensor) -> None:
        produced = self._owner()
        if produced is None:
            self.take_off()
            return
        task = graph_task_id()
        if task not in (-1, produced.task):
            produced.hear(task)


def _is_capturing(device: torch.device) -> bool:
    # What is launched while a graph is captured would be part of it.
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
