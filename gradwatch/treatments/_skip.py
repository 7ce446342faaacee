"""Skipping: the whole step, or single parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..protocols import Context
from ..records import select_paths
from ..requests import StopTraining
from ..torchside import is_host
from ._base import BaseTreatment, chosen, read_trigger
from ._checks import check_count, check_patterns

if TYPE_CHECKING:
    from ..stats import Gradients

__all__ = ["SkipParameter", "SkipStep"]


@dataclass(frozen=True, eq=False)
class SkipStep(BaseTreatment):
    """Keep the optimizer from moving anything at this step: parameters, its own state, and the model's buffers.

    On its own it skips steps whose global norm is not finite; behind a rule, steps at which the rule fires. After
    `max_consecutive` skipped steps in a row it asks for a stop: a run that skips for ever looks alive and learns
    nothing.

    Args:
        max_consecutive: skipped steps in a row that end the run; None: never.
        paths: glob patterns of the parameters whose norm decides, where there is no rule.
    """

    max_consecutive: int | None = 10
    paths: str | Sequence[str] = field(default="*", kw_only=True)
    _memory: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    order: ClassVar[int] = 12

    def __post_init__(self) -> None:
        check_count(self, "max_consecutive", self.max_consecutive, at_least=1, optional=True)
        check_patterns(self, "paths", self.paths)
        self._memory.update(consecutive=0, skipped=0, last_step=-1)

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        flag = self._flag(grads, context)
        if not isinstance(flag, Tensor):
            if flag:
                context.veto(True, reason=self._reason(context))
            return self._count(bool(flag), context)
        context.veto(flag, reason=self._reason(context))
        # Counted by `settle`, when the values have come to the host.
        return {"applied": flag}

    def settle(self, values: Mapping[str, float], context: Context) -> Mapping[str, float]:
        """Count a step whose report has come to the host later; return what is to be added to the report."""
        if "consecutive" in values:
            return {}
        counted = self._count(bool(values.get("applied", 0.0)), context)
        return {name: value for name, value in counted.items() if name != "applied"}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._memory)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._memory.update(state)

    def _flag(self, grads: Gradients, context: Context) -> bool | Tensor:
        if context.rule:
            return read_trigger(context)
        part = chosen(grads, self.paths)
        if not len(part):
            return False
        flag = ~torch.isfinite(part.global_norm)
        if isinstance(context.trigger, Tensor):
            # A loss scaler drops an overflowing step by itself: no fault, and nothing to count.
            flag = flag & context.trigger.to(flag.device)
        return bool(flag) if context.can_read or is_host(flag.device) else flag

    def _count(self, is_skipped: bool, context: Context) -> dict[str, float]:
        memory = self._memory
        # Behind a rule it may be asked only when the rule fires: a gap in the steps ends a row, too.
        follows = context.step - memory["last_step"] <= 1
        if is_skipped:
            memory["consecutive"] = (memory["consecutive"] if follows else 0) + 1
            memory["last_step"] = context.step
            memory["skipped"] += 1
        else:
            memory["consecutive"] = 0
        if is_skipped and self.max_consecutive is not None and memory["consecutive"] >= self.max_consecutive:
            context.request(StopTraining(reason=self._stop_reason(context)))
        return {
            "applied": float(is_skipped),
            "consecutive": float(memory["consecutive"]),
            "skipped": float(memory["skipped"]),
        }

    def _reason(self, context: Context) -> str:
        return f"rule {context.rule!r} fired" if context.rule else "the global gradient norm is not finite"

    def _stop_reason(self, context: Context) -> str:
        count = self._memory["consecutive"]
        return (
            f"{count} optimizer steps in a row were skipped, the last at step {context.step} because "
            f"{self._reason(context)}: the gradients do not recover by themselves. Look at the first of these steps; "
            f"SkipStep(max_consecutive={count}) sets how many are borne."
        )


@dataclass(frozen=True, eq=False)
class SkipParameter(BaseTreatment):
    """Keep the optimizer from moving single parameters at this step, by taking their gradient away (None, not zero:
    momentum, Adam and weight decay move parameters whose gradient is zero).

    On its own it skips parameters whose norm is not finite; behind a rule, those that the rule names (all of `paths`
    where it names the whole model). It must look at the verdict on the host; where nobody waits for that, it vetoes
    the whole step instead.

    Args:
        paths: glob patterns of the parameters that may be skipped.
    """

    paths: str | Sequence[str] = "*"
    order: ClassVar[int] = 10
    needs_host: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_patterns(self, "paths", self.paths)

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        trigger = read_trigger(context)
        if trigger is False or not len(grads):
            return {"applied": 0.0, "skipped": 0.0}
        bad = ~torch.isfinite(grads.norms)
        can_read = context.can_read or is_host(bad.device)
        if isinstance(trigger, Tensor) or not can_read:
            flag = trigger if context.rule else bad.any()
            context.veto(flag, reason="single parameters can't be skipped without waiting for the verdict")
            return {"applied": flag}
        allowed = select_paths(grads.paths, self.paths)
        if not context.rule:
            named = bad.cpu().numpy()
        else:
            paths = [finding.path for finding in context.findings]
            patterns = ["*"] if not paths or "" in paths else [*paths, *(f"{path}.*" for path in paths)]
            named = select_paths(grads.paths, patterns)
        positions = [i for i, skip in enumerate((allowed & named).tolist()) if skip]
        if positions:
            grads.drop_(positions)
        return {"applied": float(bool(positions)), "skipped": float(len(positions))}
