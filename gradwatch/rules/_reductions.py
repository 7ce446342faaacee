"""Over what a loss is summed that others take the mean of."""

from __future__ import annotations

import math

from ..records import StepRecord

__all__ = ["FORMULAS", "reductions", "summed_over"]

FORMULAS = ("cross_entropy", "squared_error", "binary_cross_entropy")
"""Losses as common losses define them, of which the batch's is likely to be one."""


def reductions(record: StepRecord) -> dict[str, float]:
    """Return what a mean is multiplied by where a loss is summed instead, by what it is summed over."""
    n = float(record.num_samples or record.scalars.get("batch_size", math.nan))
    units = record.scalars.get("output_units", math.nan)
    found = {"": 1.0, "the batch": n, "the units of each sample": units, "the batch and the units": n * units}
    return {name: scale for name, scale in found.items() if not name or (math.isfinite(scale) and scale > 1)}


def summed_over(record: StepRecord) -> str:
    """Return over what the loss is summed where others take the mean, as a phrase; "" where nobody knows."""
    for name in FORMULAS:
        mean = record.scalars.get(name, math.nan)
        for over, scale in reductions(record).items():
            if over and math.isfinite(mean) and abs(record.loss - scale * mean) < 0.01 * abs(record.loss):
                return f": it is summed over {over} ({scale:.0f} times the mean), not averaged"
    return ""
