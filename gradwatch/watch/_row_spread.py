"""Whether the units of a layer were told apart when training began."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..stats import At, Number, row_spread
from ..torchside import shape_of, whole_of
from ._measurement import Measurement, StepView
from ._model_meter import as_held

__all__ = ["RowSpread"]


class RowSpread(Measurement):
    """How far the rows of each weight of two or more dimensions differ, at the first step: see `row_spread`."""

    part = "comparing the rows of weights"
    gives = ("row_spread",)
    every = 0
    meets = True
    is_awaited = True

    def look(self, view: StepView, tables: dict[str, Tensor]) -> Mapping[str, Number] | None:
        chosen = [p for p in as_held(view.gradients.params) if len(shape := shape_of(p)) >= 2 and shape[0] > 1]
        if not chosen:
            return None
        spreads = row_spread([p.detach() if whole_of(p) is None else p for p in chosen], of=chosen)
        return {"places": self.meter.positions(chosen), "spreads": spreads}

    def conclude(self, found: Mapping[str, Any]) -> Mapping[str, float | At]:
        return {"row_spread": At(found["places"], found["spreads"])}
