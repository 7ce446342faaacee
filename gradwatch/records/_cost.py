"""What gradwatch itself takes of a step, as every door says it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ._index import Floats

__all__ = ["cost_of_steps"]

LEAST = 20
"""Steps from which on it is said what a step cost."""


def cost_of_steps(steps: NDArray[np.integer] | Floats, times: Floats, spent: Floats) -> str:
    """Return what gradwatch took of a step, and the step in all, in words; "" where too few steps tell.

    Medians, so that what is done once in a run (a compilation, the first step) counts for no step.

    Args:
        steps: of the records, in their order.
        times: when each was over, in seconds.
        spent: by gradwatch since the step before, in seconds; nan where that was not measured.
    """
    known = spent[np.isfinite(spent)]
    if len(steps) < LEAST or not len(known):
        return ""
    whole = float(np.median(np.diff(times) / np.maximum(np.diff(steps), 1)))
    return f"{_seconds(float(np.median(known)))} a step, of {_seconds(whole)}"


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2g} ms" if seconds < 0.1 else f"{seconds:.2g} s"
