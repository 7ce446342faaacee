"""Letting the optimizer forget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..protocols import Context
from ._base import BaseTreatment, chosen, read_trigger
from ._checks import check_count, check_patterns
from ._optimizer_state import MOMENTS, states_of

if TYPE_CHECKING:
    from ..stats import Gradients

__all__ = ["ResetMoments", "reset_moments_"]


@torch.no_grad()
def reset_moments_(state: Mapping[str, Any]) -> int:
    """Set an optimizer's memories of one parameter to zero, its step count too; return how many tensors there were.

    Without the step count Adam's bias correction would take the new, short memory for a long one, and its next steps
    would be three times too long.
    """
    count = 0
    for key in MOMENTS:
        value = state.get(key)
        if isinstance(value, Tensor):
            # NAdam's running product begins at one.
            value.fill_(1.0 if key == "mu_product" else 0.0)
            count += 1
    step = state.get("step")
    if count and isinstance(step, Tensor):
        step.zero_()
    elif count and step is not None and isinstance(state, dict):
        state["step"] = 0
    return count


@dataclass(frozen=True, eq=False)
class ResetMoments(BaseTreatment):
    """Set the optimizer's moments to zero, so that a spike it has taken in does not slow it for long (SPAM).

    Behind a rule when the rule fires; on its own every `every` steps. It must look at the verdict on the host: where
    nobody waits for that, it resets when the verdict has arrived.

    Args:
        every: optimizer steps between resets, where there is no rule; SPAM takes 500.
        paths: glob patterns of parameters.
    """

    every: int | None = None
    paths: str | Sequence[str] = field(default="*", kw_only=True)
    _pending: list[Sequence[Tensor]] = field(default_factory=list, init=False, repr=False)
    order: ClassVar[int] = 15
    needs_host: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count(self, "every", self.every, at_least=1, optional=True)
        check_patterns(self, "paths", self.paths)

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        part = chosen(grads, self.paths)
        if context.rule:
            trigger = read_trigger(context)
        else:
            trigger = self.every is not None and context.step > 0 and context.step % self.every == 0
        if isinstance(trigger, Tensor):
            self._pending[:] = [part.params]
            return {"applied": trigger}
        return {"applied": float(trigger), "reset": float(self._reset(part.params, context) if trigger else 0)}

    def settle(self, values: Mapping[str, float], context: Context) -> Mapping[str, float]:
        """Reset now that the verdict has come to the host; return what is to be added to the report."""
        if not self._pending:
            return {}
        params = self._pending.pop()
        return {"reset": float(self._reset(params, context) if values.get("applied") else 0)}

    def _reset(self, params: Sequence[Tensor], context: Context) -> int:
        return sum(reset_moments_(state) for p in params for state in states_of(context.optimizers, p))
