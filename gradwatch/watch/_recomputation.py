"""Whether the same batch gives the same gradient: a step's micro-batches are run again now and then, and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .._warn import one_line
from ..stats import At, Ranks
from ..torchside import Aside, StandIn, WeakHook, checksum, differ, is_owned, untouched
from ._measurement import Measurement, StepView
from ._model_meter import ModelMeter
from ._options import MeasureOptions
from ._replays import Replay
from ._step_inputs import StepInputs

__all__ = ["Recomputation", "Recomputed"]

PROVEN = 3
"""Times that a parameter's gradient must have come out the same before it is a fault when it does not."""
_RERUNS = 3
_BEYOND = 10.0
"""Times the noise of re-runs that a step's gradient must be away from them all, where these differ among themselves."""

Floats = NDArray[np.float64]


@dataclass
class Recomputed:
    """What one rank found.

    Attributes:
        elements: per parameter of the index, how many elements of its gradient came out otherwise; 1 where only that
            they do is known; nan where it can't be judged.
        noise: largest relative distance between two re-runs.
    """

    elements: Floats
    noise: float = 0.0


@dataclass
class _Record:
    """What is known of one parameter's gradient from earlier times."""

    same: int = 0
    is_never: bool = False
    noises: list[float] = field(default_factory=list)


class Recomputation(Measurement):
    """Runs the micro-batches of a step again and compares gradients, bit for bit where the same bits have come before.

    After Megatron-LM's rerun state machine (megatron/core/rerun_state_machine.py): a first result, a second one on the
    same device; where these differ a third one tells whether the computation repeats itself at all. Where it does not,
    the step must be farther from the re-runs than these are from each other. Gradients are taken as they are complete
    on this rank, before any reduction: a fault of one rank is its own.

    Attributes:
        is_acted_upon: something changes gradients inside backward.

    Copies of gradients take a fourth of the memory limit; of those beyond that checksums are kept.
    """

    part = "computing gradients again"
    gives = ("recompute_differs", "recompute_rank", "recompute_noise", "recompute_elements")
    unseen = "whether a batch gives the same gradient twice is not seen: {}"
    of_params = reruns = True

    def __init__(self, meter: ModelMeter) -> None:
        super().__init__(meter)
        self.every = meter.options.recompute_every or 1
        self._limit = meter.options.memory_limit_bytes // 4
        self._step = -1
        self._handles: list[Any] = []
        self._kept: dict[int, Tensor] = {}
        self._whole: set[int] = set()
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._known: dict[str, _Record] = {}
        self._scales: list[float] = []
        self.found: Recomputed | None = None
        self.is_acted_upon = False
        self.failure = ""

    @classmethod
    def is_on(cls, options: MeasureOptions) -> bool:
        return options.recompute_every is not None

    @property
    def is_listening(self) -> bool:
        """Whether something of a step is kept."""
        return self._step >= 0

    def begin(self, step: int) -> None:
        """Keep what a step begins with, and its gradients as they are completed."""
        if step == self._step:
            return
        self.forget()
        self._step, self.found = step, None
        buffers = list(self.meter.model.buffers())
        with Aside():
            self._buffers = [(b, b.detach().clone()) for b in buffers if b.layout is torch.strided and not b.is_meta]
        room = self._limit
        for _, _, p in self.meter.watched.params:
            if not _is_comparable(p):
                continue
            room -= p.nbytes
            if room >= 0:
                self._whole.add(id(p))
            self._handles.append(WeakHook.of(self._note).hang(p.register_post_accumulate_grad_hook))

    def _note(self, param: Tensor) -> None:
        try:
            with Aside():
                if param.grad is not None and param.grad.layout is torch.strided:
                    self._kept[id(param)] = self._as_kept(param, param.grad)
        except Exception as error:  # in the midst of backward nothing may escape
            self.failure = one_line(error)
            self.forget()

    def _as_kept(self, param: Tensor, grad: Tensor) -> Tensor:
        """Return a copy of a gradient, or its checksum. A zero has no sign: 0 is added to what a first one is not."""
        copied = grad.detach() + 0.0
        return copied if id(param) in self._whole else checksum(copied)

    def note_scale(self, scale: float) -> None:
        """Say what a micro-batch's loss is multiplied by before backward."""
        if self._step >= 0:
            self._scales.append(scale)

    def forget(self) -> None:
        """Let go of everything that was kept of a step. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._kept, self._buffers, self._scales, self._step = [], {}, [], [], -1
        self._whole = set()

    def rerun(self, replays: Sequence[Replay], inputs: StepInputs) -> None:
        """Find out which gradients come out otherwise. Reads the device; random states, buffers and gradients are as
        before afterwards, bit for bit."""
        # Of several optimizers that step one by one, the first has looked.
        if self.is_listening:
            try:
                self._compare(replays)
            finally:
                self.forget()

    def _compare(self, replays: Sequence[Replay]) -> None:
        if self.is_acted_upon:
            raise ValueError("a treatment works inside backward")
        watched = self.meter.watched
        chosen = [(path, p) for _, path, p in watched.params if id(p) in self._kept]
        if not chosen or not replays:
            raise ValueError(self.failure or "no gradient of a whole tensor, or no forward pass of the model, was seen")
        given, params = [self._kept[id(p)] for _, p in chosen], [p for _, p in chosen]
        runs = [self._rerun(replays, params)]
        if not all(_alike(given, runs[0])):
            runs.append(self._rerun(replays, params))
            if not all(_alike(runs[0], runs[1])):
                runs += [self._rerun(replays, params) for _ in range(_RERUNS - 2)]
        # What is the same as what: of all pairs of results, the step's own first.
        results: list[Sequence[Tensor | None]] = [given, *runs]
        same = {(a, b): _alike(results[a], results[b]) for b in range(len(results)) for a in range(b)}
        num_params = len(watched.index) - len(watched.modules)
        elements, noise = np.full(num_params, np.nan), 0.0
        for i, (path, p) in enumerate(chosen):
            mine = {pair: flags[i] for pair, flags in same.items()}
            count, spread = self._judge(path, [result[i] for result in results], mine)
            elements[watched.by_id[id(p)]] = count
            noise = max(noise, spread)
        self.found = Recomputed(elements, noise)

    def _judge(
        self, path: str, results: Sequence[Tensor | None], same: Mapping[tuple[int, int], bool]
    ) -> tuple[float, float]:
        """Return how many elements of a gradient are not what they should be, nan where nobody can tell; and how far
        two re-runs are from each other."""
        record = self._known.setdefault(path, _Record())
        told = [result for result in results if result is not None]
        if record.is_never or len(told) < len(results):
            record.is_never = True
            return np.nan, 0.0
        if all(same.values()):
            record.same += 1
            return 0.0, 0.0
        if record.same >= PROVEN and not record.noises and any(same.values()):
            # Two of the results are the same: another one is wrong, the step's own or that of a second run.
            right = next(pair[0] for pair, flag in same.items() if flag)
            return float(max(_count(told[right], other) for other in told)), 0.0
        return self._beyond_noise(record, told)

    def _beyond_noise(self, record: _Record, told: Sequence[Tensor]) -> tuple[float, float]:
        given, runs = told[0], told[1:]
        noise = max((_distance(a, b) for i, a in enumerate(runs) for b in runs[:i]), default=0.0)
        if not noise > 0:
            # The same bits each time, and not those of the step: what is run again is not what was run.
            record.is_never = True
            return np.nan, 0.0
        usual, is_known = max([noise, *record.noises]), len(record.noises) >= PROVEN
        record.noises = [*record.noises, noise][-16:]
        if not is_known:
            return np.nan, noise
        is_far = min(_distance(given, run) for run in runs) > _BEYOND * usual
        return (float(_count(given, runs[0])) if is_far else 0.0), noise

    def _rerun(self, replays: Sequence[Replay], params: Sequence[Tensor]) -> list[Tensor | None]:
        sums: list[Tensor | None] = [None] * len(params)
        # The user's hooks on saved tensors (a count, an offload) are not for a second run; an optimizer may step here.
        with untouched(self.meter.model), saved_tensors_hooks(Tensor.detach, lambda t: t), torch.enable_grad():
            self._put_buffers()
            for number, replay in enumerate(replays):
                begun = replay.begin()
                scale = self._scales[number] if number < len(self._scales) else 1.0
                heads = [
                    torch.full_like(r, scale) if g is None else g for r, g in zip(begun.roots, begun.grads, strict=True)
                ]
                if begun.roots:
                    found = torch.autograd.grad(begun.roots, params, heads, allow_unused=True)
                    with Aside():
                        sums = [_added(a, g) for a, g in zip(sums, found, strict=True)]
        with Aside():
            return [None if s is None else self._as_kept(p, s) for p, s in zip(params, sums, strict=True)]

    def _put_buffers(self) -> None:
        """Let the second run begin with the buffers that the first one began with."""
        with torch.no_grad():
            for buffer, copy in self._buffers:
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)

    def tables(self, ranks: Ranks) -> Mapping[str, tuple[int, ...]]:
        return {"ranks": (ranks.num, 3), "rows": (ranks.num_params, 2)}

    def look(self, view: StepView, tables: dict[str, Tensor]) -> None:
        found, self.found = self.found, None
        if found is None:
            return
        known = np.isfinite(found.elements)
        elements = np.where(known, found.elements, 0.0)
        rows, ranks = tables["rows"], tables["ranks"]
        rows.copy_(torch.from_numpy(np.stack([elements, known], axis=1)))
        told = [float((elements > 0).sum()), float(known.any()), found.noise]
        ranks[view.rank] = torch.tensor(told, dtype=ranks.dtype)

    def conclude(self, found: Mapping[str, Any]) -> Mapping[str, float | At]:
        """How many gradients came out otherwise, on which rank, and how far re-runs are apart; nothing where none could
        be compared."""
        ranks, rows = found["ranks"], found["rows"]
        if not ranks[:, 1].any():
            return {}
        known = np.flatnonzero(rows[:, 1])
        told: dict[str, float | At] = {
            "recompute_differs": float(ranks[:, 0].max()),
            "recompute_noise": float(ranks[:, 2].max()),
            "recompute_elements": At(known, rows[known, 0]),
        }
        return told | ({"recompute_rank": float(ranks[:, 0].argmax())} if told["recompute_differs"] else {})


def _is_comparable(p: Tensor) -> bool:
    """Return whether a parameter's gradient is whole, and what backward gives: no hook of the user's changes it."""
    if isinstance(p, StandIn) or type(p.data) is not Tensor or not (p.requires_grad and p.is_leaf):
        return False
    hooks = [*(getattr(p, "_backward_hooks", None) or {}).values()]
    hooks += [*(getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()]
    return all(is_owned(hook) for hook in hooks)


def _added(held: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if grad is None or grad.layout is not torch.strided:
        return held
    return grad.detach() if held is None else held + grad.detach()


def _alike(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> list[bool]:
    """Return which gradients are the same, bit for bit; one host read for each device."""
    places = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x is not None and y is not None]
    unlike = differ([a[i] for i in places], [b[i] for i in places])  # type: ignore[misc]  # those are tensors
    found = dict(zip(places, unlike, strict=True))
    return [not found.get(i, True) for i in range(len(a))]


def _count(a: Tensor, b: Tensor) -> int:
    """Return how many elements differ; of checksums 1 where these do."""
    return int((a != b).sum() - (a.isnan() & b.isnan()).sum())


def _distance(a: Tensor, b: Tensor) -> float:
    """Return how far two gradients are apart, over the size of the first; 0 of checksums, which don't tell."""
    if not a.is_floating_point():
        return 0.0
    length = float(torch.linalg.vector_norm(a, dtype=torch.float32))
    return float(torch.linalg.vector_norm(a - b, dtype=torch.float32)) / length if length else 0.0
