"""Lower learning rates that no schedule can undo."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..torchside import StepHook
from ._checks import check_count, check_number

__all__ = ["LearningRates"]


class LearningRates:
    """Multiplies the learning rates of optimizers for a number of steps, only while they step.

    A factor written into `param_groups` is overwritten by the next scheduler step, or compounds in it. Here it is put
    in just before the optimizer's step and taken out just after, so every scheduler sees the rate that it set itself.

    Lowered again under the same name, the time begins anew; of several names the smallest factor counts. Factors never
    compound.

    Args:
        optimizers: whose rates. Their step hooks are registered while a factor is in force, or after `install()`.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._optimizers = [getattr(o, "optimizer", o) for o in optimizers]
        # Steps left by name, of each optimizer; None: until `restore`.
        self._lowered: dict[str, tuple[float, list[int | None]]] = {}
        self._own: dict[int, list[Any]] = {}
        self._steps = _Steps()
        self._handles: list[StepHook] = []

    @property
    def factor(self) -> float:
        """What the next step's rates are multiplied by: 1 where nothing is lowered."""
        return min((self._factor(k) for k in range(len(self._optimizers))), default=1.0)

    def lower(self, factor: float, steps: int | None, *, name: str = "") -> None:
        """Multiply the rates by `factor` for the next `steps` optimizer steps (None: until `restore`).

        Raises:
            ConfigError: a factor outside (0, 1), or less than one step.
        """
        check_number(self, "factor", factor, above=0, below=1)
        check_count(self, "steps", steps, at_least=1, optional=True)
        self._lowered[name] = (factor, [steps] * len(self._optimizers))
        self.install()

    def restore(self, name: str | None = None) -> None:
        """End one lowering, or all."""
        if name is None:
            self._lowered.clear()
        else:
            self._lowered.pop(name, None)

    def install(self) -> None:
        """Put the hooks on the optimizers; called again, nothing."""
        if self._handles:
            return
        for optimizer in self._optimizers:
            self._handles.append(StepHook.of(self._before).hang(optimizer.register_step_pre_hook))
            self._handles.append(StepHook.of(self._after).hang(optimizer.register_step_post_hook))

    def close(self) -> None:
        """Take the hooks off and put the optimizers' own rates back; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for optimizer in self._optimizers:
            self._put_back(optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {name: {"factor": f, "left": list(left)} for name, (f, left) in self._lowered.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._lowered = {
            name: (float(item["factor"]), _fit(item["left"], len(self._optimizers))) for name, item in state.items()
        }
        if self._lowered:
            self.install()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._steps.begin(optimizer):
            return
        # A closure that raised left the lowered rates behind.
        self._put_back(optimizer)
        factor = self._factor(self._position(optimizer))
        if factor == 1.0:
            return
        self._own[id(optimizer)] = [_copied(group.get("lr")) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            if isinstance(group.get("lr"), (int, float, Tensor)):
                _set(group, group["lr"] * factor)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._steps.end(optimizer):
            return
        self._put_back(optimizer)
        k = self._position(optimizer)
        for _, left in self._lowered.values():
            steps = left[k]
            left[k] = None if steps is None else max(steps - 1, 0)
        over = [name for name, (_, left) in self._lowered.items() if all(n == 0 for n in left)]
        for name in over:
            del self._lowered[name]

    def _factor(self, k: int) -> float:
        """Return what the rates of one optimizer are multiplied by at its next step."""
        return min((factor for factor, left in self._lowered.values() if _is_left(left[k])), default=1.0)

    def _put_back(self, optimizer: Optimizer) -> None:
        own = self._own.pop(id(optimizer), None)
        if own is not None:
            for group, rate in zip(optimizer.param_groups, own, strict=False):
                if isinstance(rate, (int, float, Tensor)):
                    _set(group, rate)

    def _position(self, optimizer: Optimizer) -> int:
        return next(k for k, known in enumerate(self._optimizers) if known is optimizer)


class _Steps:
    """The steps that go on. One that calls the step it inherits is one step, though torch calls hooks around both.

    A step that raises is not said to have ended: it is known by its caller, which is in the stack no more.
    """

    def __init__(self) -> None:
        self._open: dict[int, tuple[FrameType, int]] = {}

    def begin(self, optimizer: Optimizer) -> bool:
        """Note a call of the hook before; return whether a step begins, and not one within it."""
        caller = frame = _caller()
        known, depth = self._open.get(id(optimizer), (None, 0))
        while frame is not known and frame.f_back is not None:
            frame = frame.f_back
        if frame is known:
            self._open[id(optimizer)] = frame, depth + 1
            return False
        self._open[id(optimizer)] = caller, 1
        return True

    def end(self, optimizer: Optimizer) -> bool:
        """Note a call of the hook behind; return whether the step is over."""
        frame, depth = self._open.pop(id(optimizer), (None, 1))
        if frame is None or depth == 1:
            return True
        self._open[id(optimizer)] = frame, depth - 1
        return False


def _caller() -> FrameType:
    """Return the frame from which torch calls our hooks."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("gradwatch."):
        frame = frame.f_back
    return frame


def _is_left(steps: int | None) -> bool:
    return steps is None or steps > 0


def _copied(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _set(group: dict[str, Any], rate: Any) -> None:
    """Set a group's rate; a tensor one keeps its place in memory, which compiled optimizers hold on to."""
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(rate)
    else:
        group["lr"] = rate


def _fit(left: Sequence[int | None], num_optimizers: int) -> list[int | None]:
    kept = list(left)[:num_optimizers]
    return kept + [0] * (num_optimizers - len(kept))
