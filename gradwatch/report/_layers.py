"""Gradient norms of each parameter over the whole run, in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tensorboard_plugin_gradwatch import MISSING

from ._data import ReportData

__all__ = ["LayerRow", "layer_rows"]


@dataclass(frozen=True)
class LayerRow:
    """Gradient norm of one parameter.

    Attributes:
        path: of the parameter.
        median: over the points kept (each the largest of its steps), finite ones.
        largest: over all steps, nan or inf where there was one.
        last: at the last point.
        num_zero, num_nonfinite: points.
    """

    path: str
    median: float
    largest: float
    last: float
    num_zero: int
    num_nonfinite: int


def layer_rows(data: ReportData) -> list[LayerRow]:
    """Return the parameters that had a gradient, largest median first."""
    table = data.tables.get("grad_norm")
    if table is None or not len(table.steps):
        return []
    rows = []
    for i in np.flatnonzero(data.index.is_parameter).tolist():
        values = table.values[:, i].astype(np.float64)
        values = values[values != MISSING]
        if not len(values):
            continue
        finite = values[np.isfinite(values)]
        rows.append(
            LayerRow(
                path=data.index.paths[i],
                median=float(np.median(finite)) if len(finite) else float("nan"),
                largest=float(np.max(values)),
                last=float(values[-1]),
                num_zero=int((values == 0).sum()),
                num_nonfinite=int((~np.isfinite(values)).sum()),
            )
        )
    return sorted(rows, key=lambda r: (-r.median if np.isfinite(r.median) else -np.inf, r.path))
