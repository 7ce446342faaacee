"""Taking the mean out of each unit's gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..protocols import Context
from ..torchside import is_host, shape_of
from ._base import BaseTreatment, chosen, read_trigger, where_triggered
from ._checks import check_patterns
from ._units import FIRST_AXIS, UnitLayout, num_unit_elements, unit_layouts, unit_sums, unit_view

if TYPE_CHECKING:
    from ..stats import Gradients

__all__ = ["Centralize", "centralize_"]


@torch.no_grad()
def centralize_(
    grads: Sequence[Tensor], *, layouts: Sequence[UnitLayout] | None = None, applies: bool | Tensor = True
) -> None:
    """Subtract from each output unit's gradient its mean, for tensors of two or more dimensions.

    Yong et al., "Gradient centralization: a new optimization technique for deep neural networks", ECCV 2020, arXiv
    2004.01461.

    Args:
        grads: changed in place; those of fewer dimensions, and sparse ones, stay.
        layouts: where the units lie; None: on the first axis everywhere.
        applies: where False nothing is subtracted; may be a 0-dim bool tensor.
    """
    for i, grad in enumerate(grads):
        if len(shape_of(grad)) < 2 or grad.is_sparse:
            continue
        layout = FIRST_AXIS if layouts is None else layouts[i]
        view = unit_view(grad, layout)[0]
        means = unit_sums(grad, layout) / num_unit_elements(grad, layout)
        view.sub_(where_triggered(applies, means, 0.0).to(view.dtype))


@dataclass(frozen=True, eq=False)
class Centralize(BaseTreatment):
    """Subtract from each output unit's gradient its mean. One-dimensional parameters stay.

    Args:
        paths: glob patterns of parameters; leave embeddings out, whose rows are not units with inputs.
    """

    paths: str | Sequence[str] = "*"
    _layouts: dict[str, UnitLayout] = field(default_factory=dict, init=False, repr=False)
    order: ClassVar[int] = 30

    def __post_init__(self) -> None:
        check_patterns(self, "paths", self.paths)

    def bind(self, model: nn.Module) -> None:
        """Find the axis of the output units of every weight."""
        super().bind(model)
        self._layouts.clear()
        self._layouts.update(unit_layouts(model))

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        part = chosen(grads, self.paths)
        trigger = read_trigger(context)
        if not len(part):
            return None
        # The mean of a row with one nan would spread it over the row.
        applies = torch.isfinite(part.global_norm)
        applies = where_triggered(trigger, applies, False)
        if is_host(applies.device) and not bool(applies):
            return {"applied": 0.0}
        centralize_(part.grads, layouts=[self._layouts.get(path, FIRST_AXIS) for path in part.paths], applies=applies)
        part.touch()
        return {"applied": applies}
