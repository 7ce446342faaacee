"""Replacing what is not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..protocols import Context
from ..torchside import is_host, moved
from ._base import BaseTreatment, chosen, read_trigger, where_triggered
from ._checks import check_patterns
from ._tensors import on_values_, summed

if TYPE_CHECKING:
    from ..stats import Gradients

__all__ = ["Sanitize", "sanitize_"]


@torch.no_grad()
def sanitize_(grads: Sequence[Tensor], *, applies: bool | Tensor = True) -> Tensor:
    """Set every nan and inf to zero, in place; return how many there were, 0-dim int64.

    Args:
        grads: changed in place.
        applies: where False nothing is changed, and nothing counted; may be a 0-dim bool tensor.
    """
    counts: list[Tensor] = []

    def clean_(values: Tensor) -> None:
        bad = where_triggered(applies, ~torch.isfinite(values), False)
        counts.append(bad.sum())
        values.masked_fill_(bad, 0.0)

    for grad in grads:
        on_values_(grad, clean_)
    if not counts:
        return torch.zeros((), dtype=torch.int64)
    return summed(counts)


@dataclass(frozen=True, eq=False)
class Sanitize(BaseTreatment):
    """Set gradients' nan and inf to zero, and count what is hidden so.

    Zeroed gradients still move weights (momentum, Adam, weight decay), a single nan mostly means that the whole
    backward pass went wrong, and a GradScaler that saw the inf skips the step all the same. `SkipStep` is the better
    choice nearly always.

    Args:
        paths: glob patterns of parameters.
    """

    paths: str | Sequence[str] = "*"
    _memory: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    order: ClassVar[int] = 11

    def __post_init__(self) -> None:
        check_patterns(self, "paths", self.paths)

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        part = chosen(grads, self.paths)
        if not len(part):
            return None
        hidden = moved(self._memory.get("hidden", torch.zeros((), dtype=torch.int64)), part.device)
        trigger = read_trigger(context)
        # A finite norm proves that every element is.
        is_clean = is_host(part.norms.device) and bool(torch.isfinite(part.global_norm))
        if trigger is False or is_clean:
            return {"applied": 0.0, "count": 0.0, "hidden": hidden}
        tensors = part.grads
        if is_host(part.norms.device):
            tensors = [t for t, ok in zip(tensors, torch.isfinite(part.norms).tolist(), strict=True) if not ok]
        count = sanitize_(tensors, applies=trigger)
        part.touch()
        self._memory["hidden"] = hidden + count
        return {"applied": count > 0, "count": count, "hidden": hidden + count}

    def state_dict(self) -> dict[str, Any]:
        return {name: value.cpu().clone() for name, value in self._memory.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._memory.clear()
        self._memory.update({name: value.clone() for name, value in state.items()})
