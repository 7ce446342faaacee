"""Takes one step's measurements: which, where from, and as which columns they come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from operator import attrgetter, is_, is_not
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ..hooks import ModuleTap, TapStats
from ..records import Floats
from ..stats import Gradients, forget_layouts, is_whole, second_look
from ..torchside import (
    Aside,
    Away,
    are_several,
    clean_path,
    find,
    home,
    is_host,
    moved,
    real_of,
    sent,
    weakly,
    why_unreadable,
    wide_dtype,
    world_size,
)
from ._account import Account
from ._batch import reduced
from ._loss_graph import SeenLoss, seen_loss
from ._model_now import FLAGS, ModelNow
from ._options import MeasureOptions
from ._paths import Watched, watched
from ._prediction import KEPT_AT_LEAST, KEPT_AT_MOST, Prediction
from ._seals import FEW, Seals
from ._stages import Stages

__all__ = ["ModelMeter", "as_held", "constant", "few_seals", "loss_value"]

_GRAD, _LAYOUT = attrgetter("grad"), attrgetter("layout")
_WIDE = (torch.float64, torch.complex128)
_USUAL = frozenset({Tensor})


class ModelMeter:
    """Measures one model for one engine. Holds the hooks; `close()` gives them back.

    Attributes:
        is_told: the trainer hands over what the model gives: modules' outputs are not looked through for it.
        sample_until: modules are sampled up to this step.
        looks_again: this rank would have its modules sampled at the next step, if all ranks did.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], options: MeasureOptions) -> None:
        self.model = model
        self.options = options
        self.optimizers = tuple(optimizers)
        self.watched: Watched = watched(model, optimizers, tuple(options.paths))
        self.model_now = ModelNow(model, self.optimizers)
        self.account = Account()
        self.account.begin(self.watched)
        self._real_paths = {clean_path(p): p for p, _ in model.named_modules() if p}
        self.tap: ModuleTap | None = self._make_tap()
        self._output: Prediction | None = None
        # Of an output that a rule's formulas need beside its targets: what is nothing beside the parameters.
        num_elements = int(self.watched.index.numel.sum())
        self._kept = min(KEPT_AT_MOST, max(KEPT_AT_LEAST, num_elements // 100))
        self._output_error: Exception | None = None
        self._loss: SeenLoss | None = None
        self.is_told = False
        self._why_apart = ""
        self._whole: tuple[Watched, dict[int, int]] | None = None
        self._home: tuple[Watched, torch.device, torch.device] | None = None
        self._ordered = False
        self.sample_until, self.looks_again = -1, False
        self._marks: Seals | None = None
        self._had_all = False
        self.is_muted: Callable[[], bool] = bool  # never, and no function of Python's is called to say so

    def _make_tap(self) -> ModuleTap | None:
        if not self.watched.modules or self.options.activations_every is None:
            return None
        paths = [self._real_paths[p] for p in self.watched.modules if p in self._real_paths]
        if not paths:
            return None
        listens, see = weakly(self._listens, False), weakly(self._see_output)
        return ModuleTap(self.model, paths, backend=self.options.backward, gate=listens, on_output=see)

    @property
    def device(self) -> torch.device:
        """Where numbers about the parameters are put together (see `home`); the CPU where there are none."""
        params = self.watched.params
        first = params[0][2].device if params else torch.device("cpu")
        # Moved to another device parameters keep their identity: the first tells.
        if self._home is None or self._home[0] is not self.watched or self._home[1] != first:
            self._home = (self.watched, first, home(p for _, _, p in params))
        return self._home[2]

    def refresh(self, step: int) -> bool:
        """Look whether anything of the model is another one than at the last step; True if the index is a new one."""
        change = self.model_now.look(at_all=not (self.model_now.is_large and self._is_calm()))
        if self.watched.stand_ins:
            self.watched.settle()
        if not change:
            return False
        if change == FLAGS:
            self.watched.retrained()
        else:
            self._follow(step)
        return True

    def _is_calm(self) -> bool:
        # Where gradients are missing or zero the parameters may tell why. Ranks look alike, whatever each has.
        return self._had_all and self.account.is_calm and not (are_several() and world_size() > 1)

    def _follow(self, step: int) -> None:
        old = self.watched
        known = self.model_now.known_paths()
        paths = tuple(self.options.paths)
        self.watched = watched(self.model, self.optimizers, paths, known=known, strict=False, why_apart=self._why_apart)
        self.model_now.note_replaced(self.watched.replaced, step)
        self._real_paths = {clean_path(p): p for p, _ in self.model.named_modules() if p}
        self._home = self._whole = None
        self._ordered = False
        order = [] if self.tap is None else self.tap.forward_order
        if order:
            # As near as can be known before the new modules have run.
            self.watched.reordered(order)
        same = len(old.hooked) == len(self.watched.hooked) and all(map(is_, old.hooked, self.watched.hooked))
        if self.tap is not None and not (same and old.modules == self.watched.modules):
            if self.tap.armed:
                # What these modules gave at this step is lost with the hooks: look again at the next. Of several ranks
                # all do, or none.
                if world_size() > 1:
                    self.looks_again = True
                else:
                    self.sample_until = max(self.sample_until, step + 1)
            self.disarm()
            self.tap.close()
            self.tap = self._make_tap()
        elif self.tap is None:
            self.tap = self._make_tap()

    def has(self, path: str) -> bool:
        """Whether a watched module is on this rank: of a pipeline's other stages none is."""
        return path in self._real_paths

    def stay_apart(self, why: str, step: int) -> None:
        """Say that no parameter's gradient can be told from here on, and why."""
        self._why_apart = why
        self._follow(step)

    def real_path(self, path: str) -> str:
        """Return a watched module's path with the parts that wrappers put into it."""
        return self._real_paths[path]

    def note_gradients(self, grads: Gradients) -> None:
        """Remember a few gradients as the optimizer will find them, where they changed since `were_kept` saw them."""
        self._marks = few_seals(grads.params)

    def were_kept(self, now: Seals | None, num_parts: int) -> float | None:
        """Return 1 if gradients were demonstrably not reset since the last step, 0 if they were, None if unknown.

        A gradient that is the same tensor, written to just once per micro-batch since, was only added to: `zero_grad`
        would have given a new one or written once more.

        Args:
            now: of the gradients as they are; None where they have nothing to tell them by.
            num_parts: micro-batches of the step.
        """
        last, self._marks = self._marks, now
        added = None if last is None or now is None else now.are_added_to(last, num_parts)
        return None if added is None else float(added)

    def arm(self) -> None:
        """Begin to listen to forward and backward passes."""
        if self.tap is not None and not self.tap.armed:
            self.tap.arm()

    def disarm(self) -> None:
        if self.tap is not None:
            self.tap.disarm()

    @property
    def armed(self) -> bool:
        return self.tap is not None and self.tap.armed

    def take_modules(self, *, is_alone: bool = False) -> TapStats | None:
        """Return what the modules gave since `arm`, and stop listening.

        Args:
            is_alone: there is no other rank, which would have to add to it.
        """
        stats = None if self.tap is None else self.tap.take(apart=is_alone and self.watched.stages is None)
        if self.tap is not None and self.options.activations_every == 1:
            self.tap.rest()
        else:
            self.disarm()
        if not self._ordered and self.tap is not None and self.tap.forward_order:
            self.watched.reordered(self.tap.forward_order)
            self._ordered = True
        return stats if self.watched.stages is None or stats is None else self._among_all(stats)

    def _among_all(self, stats: TapStats) -> TapStats:
        """Return statistics of the modules on this rank in the rows of all stages' modules."""
        found = TapStats.blank(self.watched.modules, self.device)
        rows = [i for i, path in enumerate(self.watched.modules) if path in self._real_paths]
        index = sent(torch.tensor(rows, dtype=torch.int64), self.device)
        found.sums.index_copy_(0, index, moved(stats.sums, self.device, found.sums.dtype))
        found.maxima.index_copy_(0, index, moved(stats.maxima, self.device, found.maxima.dtype))
        return found

    def blank_modules(self, num: int) -> TapStats | None:
        """Return what `take_modules` would of that many modules, had nothing been seen; None where none is watched."""
        if not num or self.options.activations_every is None:
            return None
        paths = self.watched.modules if self.tap is None or self.watched.stages is not None else self.tap.paths
        return TapStats.blank(paths if len(paths) == num else ("",) * num, self.device)

    def module_positions(self) -> NDArray[np.int64]:
        """Return the modules' places in the index, in the tap's order."""
        places = self.watched.index.positions
        return np.asarray([places[p] for p in self.watched.modules], np.int64)

    def _listens(self) -> bool:
        # Validation runs between training steps; per-task gradients are probed inside them.
        return self.model.training and not self.is_muted()

    def _see_output(self, output: Any) -> None:
        """Keep what is to be kept of the output of a module that no other one called: a stand-in for the model's."""
        if self.is_told or self.watched.stages is not None:
            return  # what a stage gives is not what the model does
        try:
            self._output = reduced(output, self._kept) or self._output
        except Exception as error:
            # Told when the step is measured, where a guard is at hand. Its frames would hold the output.
            self._output_error = error.with_traceback(None)

    def take_output(self) -> tuple[Prediction | None, Exception | None]:
        """Return what was kept of the last output, and why one could not be read; and let go of both."""
        found = self._output, self._output_error
        self._output = self._output_error = None
        return found

    def see_loss(self, loss: Any) -> None:
        """Keep what is to be kept of a loss before its backward, at a step whose modules are listened to."""
        if self.armed:
            self._loss = None
            with Aside():
                self._loss = seen_loss(loss, self._kept)

    def take_loss(self) -> SeenLoss | None:
        """Return what was kept of the last loss, and let go of it."""
        found, self._loss = self._loss, None
        return found

    def gradients(self, optimizers: Sequence[Optimizer], grad_scale: float | Tensor) -> Gradients:
        """Return the gradients of the watched parameters that these optimizers hold."""
        return self.listed_gradients(optimizers, grad_scale)[0]

    def listed_gradients(
        self, optimizers: Sequence[Optimizer], grad_scale: float | Tensor
    ) -> tuple[Gradients, list[Tensor] | None]:
        """Return the same, and what its `tensors` gives now where it has been listed: asking each parameter is what
        costs."""
        watched, used_up = self.watched, self.account.is_used_up
        if watched.stages is not None:
            return self._staged_gradients(watched.stages, optimizers, grad_scale), None
        tensors = self.all_gradients() if len(optimizers) == len(self.optimizers) else None
        if tensors is not None:
            return Gradients.of(watched.held_paths, watched.held, grad_scale=grad_scale), tensors
        named = [(path, p) for _, path, p in watched.params if not used_up(p)]
        if len(optimizers) != len(self.optimizers):
            held = watched.held_by(optimizers)
            named = [(path, p) for path, p in named if id(p) in held]
        return Gradients.collect(named, grad_scale=grad_scale), None

    def all_gradients(self) -> list[Tensor] | None:
        """Return the gradients of `watched.held` where each has one that can be read and nobody has used up; else
        None."""
        self._had_all = False
        if self.account.inside:
            return None
        tensors: list[Any] = list(map(_GRAD, self.watched.held))
        # Of torch's own class all can be read but what is found out where that is measured.
        if _USUAL.issuperset(map(type, tensors)):
            self._had_all = True
            return tensors
        is_there = all(map(is_not, tensors, repeat(None)))
        return tensors if is_there and not any(map(why_unreadable, tensors)) else None

    def _staged_gradients(
        self, stages: Stages, optimizers: Sequence[Optimizer], grad_scale: float | Tensor
    ) -> Gradients:
        """Return the gradients of all stages, the same list on every rank, whatever each has at this step."""
        held, named = self.watched.held_by(optimizers), []
        for _, path, p in self.watched.params:
            if id(p) in held or id(real_of(p)) in held:
                has = p.grad is not None and not self.account.is_used_up(p) and not why_unreadable(p.grad)
                named.append((path, p if has else stages.blanks[id(p)]))
        return Gradients.collect(named, grad_scale=grad_scale)

    def whole_places(self, params: Sequence[Tensor]) -> tuple[dict[int, int], int]:
        """Return which of these parameters are whole on every rank, beside others in pieces: position -> place among
        all such ones; and how many there are, whichever have a gradient at this step."""
        if self._whole is None or self._whole[0] is not self.watched:
            whole = [] if self.watched.stages is not None else [id(p) for p in self.watched.held if is_whole(p)]
            self._whole = (self.watched, {key: place for place, key in enumerate(whole)})
        known = self._whole[1]
        return {i: known[id(p)] for i, p in enumerate(params) if id(p) in known}, len(known)

    def positions(self, params: Sequence[Tensor]) -> NDArray[np.int64]:
        """Return the parameters' places in the index."""
        if params is self.watched.held:
            return self.watched.held_positions
        by_id = self.watched.by_id
        return np.fromiter((by_id[id(p)] for p in params), np.int64, len(params))

    def look_again(self, grads: Gradients, norms: Floats) -> Floats:
        """Return norms with a rescaled second look at those of float64 gradients whose squares leave float64."""
        tensors = grads.tensors
        if len(tensors) != len(norms):
            return norms  # some turned out to be on no rank
        far = (norms == 0) | np.isinf(norms) | (norms < 1e-140)
        doubtful = [i for i in np.flatnonzero(far).tolist() if tensors[i].dtype in _WIDE]
        if not doubtful:
            return norms
        params = grads.params
        again = second_look([tensors[i] for i in doubtful], of=[params[i] for i in doubtful]).cpu().numpy() / abs(
            grads.grad_scale
        )
        norms = norms.copy()
        norms[doubtful] = again
        return norms

    def close(self) -> None:
        self.disarm()
        if self.tap is not None:
            self.tap.close()
        self._output = self._output_error = self._loss = None
        forget_layouts()


def loss_value(value: Any, device: torch.device, *, as_is: bool = False) -> Tensor | float:
    """Return a loss given as a tensor, a number, an array or something with a `loss`; of several elements their mean.

    A number where the host knows it, else a 0-dim tensor on the device, in its widest floats, that nobody has read.

    Args:
        value: what was given.
        device: where the numbers about the step are.
        as_is: in the loss's own floats, where that takes no kernel: nobody is to add to it.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(value, Tensor):
        if value.is_complex() or value.is_meta:
            raise TypeError(f"a loss must be real. Got {value.dtype} on device {value.device}.")
        if is_host(value.device) and is_host(device) and value.layout is torch.strided and value.numel() == 1:
            return float(value.detach())
        if as_is and value.device == device and value.dim() == 0 and value.is_floating_point():
            return value.detach()
        value = moved(value.detach(), device, wide_dtype(device))
        return value.mean() if value.dim() else value
    if isinstance(value, (np.ndarray, np.complexfloating)) and np.iscomplexobj(value):
        raise TypeError(f"a loss must be real. Got {value.dtype}.")
    if isinstance(value, np.ndarray):
        return float(value.mean())
    if hasattr(type(value), "__float__"):
        return float(value)
    inner = find(value, "loss")
    if inner is None:
        raise TypeError(f"a loss must be a tensor or a number. Got {type(value).__name__}.")
    return loss_value(inner, device, as_is=as_is)


def constant(value: float, device: torch.device) -> Tensor:
    """Return a number as a 0-dim tensor in the device's widest floats; `torch.tensor` would wait for the device."""
    return torch.full((), float(value), dtype=wide_dtype(device), device=device)


def as_held(params: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return parameters, where something stands for one that has no gradient, too."""
    return [p.behind if isinstance(p, Away) else p for p in params]


def few_seals(params: Sequence[Tensor]) -> Seals | None:
    """Return the seals of the first few gradients; None where they are of a kind that keeps no count of writes."""
    params = params[:FEW]
    grads = [p.grad for p in params]
    # Exactly torch.Tensor: sharded ones have none.
    if set(map(type, grads)) != {Tensor} or set(map(_LAYOUT, grads)) != {torch.strided}:
        return None
    return Seals(params, grads)  # type: ignore[arg-type]
