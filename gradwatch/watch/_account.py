"""What became of every parameter at a step: measured, without a gradient and why, or not seen and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import attrgetter

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from ..records import StepRecord
from ..torchside import real_of
from ._paths import Watched

__all__ = ["MOVED", "NO_BACKWARD", "Account"]

NO_BACKWARD = (
    "no backward reached a parameter since the last step, or gradients were reset before the step was measured"
)
STEPS_INSIDE = (
    "its optimizer steps inside backward: gradients are used, and freed, before they can be read. Step after backward, "
    "or watch the norms that the hook itself sees"
)
MOVED = (
    "moved and its gradient was used up before it could be read: something steps inside backward. Give that optimizer "
    "to gradwatch, and step after backward"
)
HOOKED = "a hook of the program's own takes its gradient inside backward"
FROZEN_ALL = "every parameter of the optimizer is frozen"
ALL_REPLACED = (
    "all that the optimizer holds was replaced in the model. Give it the new parameters, or make it anew from the model"
)
NOTHING_HELD = "the optimizer holds no parameter"

_HOOKS = attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")
_VERSION = attrgetter("_version")
_NOTHING: set[int] = set()
_MANY = 2048


class Account:
    """Keeps, from step to step, what tells a gradient that was used up from one that never came.

    Attributes:
        is_calm: at the step that was measured last each parameter had a gradient, and none was zero.
        inside: ids of parameters whose optimizer stepped in the midst of this step's backward.
        has_own_hooks: gradwatch listens to parameters' gradients itself.
        heard: ids of parameters that tell it of a backward, by one hook more.
        num_steps: on record.
        num_inside: steps of optimizers in the midst of a backward.
        blanks: why there was no gradient at all at a step -> how often.
        never: paths of parameters in the optimizer that had a gradient at no step so far.
    """

    def __init__(self) -> None:
        self._began: tuple[Sequence[Tensor], list[int]] = ((), [])
        self._held: Sequence[Tensor] = ()
        self.is_calm = False
        self.inside: set[int] = set()
        self.has_own_hooks = False
        self.heard: set[int] = set()
        self.num_steps = self.num_inside = 0
        self.blanks: Counter[str] = Counter()
        self.never: set[str] = set()
        self._paths: tuple[str, ...] = ()
        self._last: dict[int, StepRecord] = {}

    def note(self, record: StepRecord) -> None:
        """Take a step's record to account."""
        self.num_steps += 1
        if "" in record.unseen:
            self.blanks[record.unseen[""]] += 1
        index = record.index
        if index.paths is not self._paths:
            old = set(self._paths)
            held = [path for path, is_held in zip(index.paths, index.in_optimizer, strict=True) if is_held]
            self.never = {path for path in held if path in self.never or path not in old}
            self._paths, self._last = index.paths, {}
        if self.never:
            self.never -= _measured(record)
        self._last[int(record.scalars.get("optimizer", 0))] = record

    @property
    def measured(self) -> set[str]:
        """Paths of the parameters whose gradient was measured at the last step of their optimizer."""
        return set().union(*map(_measured, self._last.values()))

    @property
    def reasons(self) -> dict[str, str]:
        """Path -> why it was not seen at the last step of its optimizer; "" for the whole model."""
        return {path: why for record in self._last.values() for path, why in record.unseen.items()}

    def begin(self, watched: Watched, *, is_plain: bool = False) -> None:
        """Remember the parameters as they are when a step begins, after the last one's update.

        Args:
            is_plain: nothing but norms is due at the step. Thousands of parameters are then asked for nothing while all
                goes well: of the first gradients that are not there the next step tells whether they were used up.
        """
        self.inside.clear()
        self._held = watched.held
        known = watched.known
        if is_plain and self.is_calm and len(known) > _MANY:
            self._began = (), []
            return
        try:
            self._began = known, list(map(_VERSION, known))
        except (RuntimeError, ValueError):
            self._began = known, _versions(known)

    def note_inside(self, optimizer: Optimizer) -> None:
        """Say that an optimizer stepped in the midst of a backward."""
        self.num_inside += 1
        self.inside.update(id(p) for group in optimizer.param_groups for p in group["params"])

    def is_used_up(self, p: Tensor) -> bool:
        """Whether the parameter's optimizer stepped in the midst of this step's backward."""
        return bool(self.inside) and id(real_of(p)) in self.inside

    def has_moved(self, p: Tensor) -> bool:
        """Whether the parameter was written to since the step began."""
        return id(p) in self._moved()

    def _moved(self) -> set[int]:
        params, before = self._began
        now = _versions(params)
        if now == before:
            return _NOTHING
        return {id(p) for p, old, new in zip(params, before, now, strict=True) if old != new}

    @property
    def written_between(self) -> float:
        """Share of the optimizers' parameters that were written to since the step began, by whatever but these."""
        moved = self._moved()
        return sum(id(p) in moved for p in self._held) / len(self._held) if moved and self._held else 0.0

    def is_taken(self, p: Tensor) -> bool:
        """Whether the program has a hook of its own on the parameter's gradient."""
        own = int(self.has_own_hooks) + (id(p) in self.heard)
        return sum(len(hooks) for hooks in _HOOKS(p) if hooks) > own

    def doubtful(self, params: Sequence[Tensor]) -> tuple[int, ...]:
        """Return which of these, if their gradient is zero, had another one that was used up inside backward."""
        known, before = self._began
        try:
            if list(map(_VERSION, known)) == before:
                return ()
        except (RuntimeError, ValueError):
            pass
        moved = self._moved()
        return tuple([i for i, p in enumerate(params) if id(p) in moved and self.is_taken(p)]) if moved else ()

    def unseen(self, watched: Watched, step: Sequence[Tensor], measured: set[int]) -> dict[str, str]:
        """Return what was not seen at this step: path -> reason.

        Args:
            watched: what is watched.
            step: the parameters of the optimizers that step.
            measured: ids of those whose gradient was read.
        """
        mine = {id(p) for p in step}
        found: dict[str, str] = {}
        for _, path, p in watched.params:
            if id(p) in mine and id(p) not in measured and p.requires_grad and (why := self._why(p)):
                found[path] = why
        for _, path, p in watched.unheld:
            if p.requires_grad and self.has_moved(p):
                found[path] = MOVED
        found |= watched.strange
        if measured:
            return found
        if watched.strange:
            return {"": next(iter(watched.strange.values())), **found}
        if watched.replaced and not watched.params:
            return {"": ALL_REPLACED, **found}
        if not step or not any(p.requires_grad for p in step):
            return {"": FROZEN_ALL if step else NOTHING_HELD}
        return {"": next(iter(found.values()), NO_BACKWARD), **found}

    def _why(self, p: Tensor) -> str:
        if self.is_used_up(p):
            return STEPS_INSIDE
        if self.has_moved(p):
            return MOVED
        return HOOKED if self.is_taken(p) else ""


def _measured(record: StepRecord) -> set[str]:
    return {record.index.paths[i] for i in np.flatnonzero(record.measured("grad_norm") & record.index.is_parameter)}


def _versions(params: Sequence[Tensor]) -> list[int]:
    try:
        return list(map(_VERSION, params))
    except (RuntimeError, ValueError):
        return [_version(p) for p in params]


def _version(p: Tensor) -> int:
    try:
        return p._version
    except (RuntimeError, ValueError):  # an inference tensor has none; a lazy parameter is not there yet
        return -1
