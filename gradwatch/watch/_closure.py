"""Steps whose forward and backward run inside the optimizer's own: `optimizer.step(closure)`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ._context import StepOutcome
from ._stepper import Stepper

__all__ = ["Evaluated", "closure_in", "only_one", "within_a_step"]


def closure_in(loss: Any) -> Callable[[], Any] | None:
    """Return the closure that stands in the place of a loss, as it does in torch's `optimizer.step`; else None."""
    return loss if callable(loss) and not isinstance(loss, Tensor) else None


def only_one(stepping: Sequence[Stepper], scaler: Any) -> Stepper:
    """Return the optimizer that takes a closure.

    Raises:
        ConfigError: there are several, or a loss scaler, which takes none.
    """
    if scaler is not None:
        raise ConfigError(
            "a GradScaler takes no closure: gradients must be unscaled, and looked through for overflows, between the "
            "backward and what the optimizer makes of it, and a closure runs inside the optimizer. Run forward and "
            "backward yourself and call `watch.step(loss=loss)`; for LBFGS train in bfloat16 or float32 without a "
            "scaler."
        )
    if len(stepping) > 1:
        raise ConfigError(
            f"a closure belongs to one optimizer, and this Watch has {len(stepping)}: call "
            "`watch.step(closure, optimizer=...)` for each."
        )
    return stepping[0]


class Evaluated:
    """A closure as the optimizer is to call it: what the first evaluation gives is measured, judged and treated.

    The decision stands for the whole step. Where it is a veto, later evaluations give the first loss again and no
    gradient: an optimizer that searches along a line finds nothing to follow.

    Args:
        closure: the user's: forward, backward, and the loss.
        measure: called with the first evaluation's loss.

    Attributes:
        outcome: of the step; None before the first evaluation.
        loss: the first evaluation's.
    """

    def __init__(self, closure: Callable[[], Any], measure: Callable[[Any], StepOutcome]) -> None:
        self._closure, self._measure = closure, measure
        self.outcome: StepOutcome | None = None
        self.loss: Any = None

    def __call__(self) -> Any:
        if self.outcome is None:
            self.loss = self._closure()
            self.outcome = self._measure(self.loss)
            return self.loss
        return self.loss if self.outcome.skip else self._closure()


def within_a_step() -> bool:
    """Return whether the `step` of some optimizer that was given a closure is among those who call.

    Also of a wrapper that no hook hears: told by its name and the parameter groups of its owner. Walks up the stack:
    for what happens seldom.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "step" and code.co_argcount > 1:
            owner, closure = map(frame.f_locals.get, code.co_varnames[:2])
            with suppress(Exception):  # it may be anything, and raise when asked
                if callable(closure) and isinstance(owner.param_groups, list):  # type: ignore[union-attr]
                    return True
        frame = frame.f_back
    return False
