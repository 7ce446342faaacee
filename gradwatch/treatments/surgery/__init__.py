"""Gradient surgery between the tasks of a batch, and the diagnosis of their conflicts.

`weights` is the bare mathematics (a Gramian in, weights out), `Surgery` the settings, `split` what a training step
calls, `SurgeryController` what an engine drives.
"""

from __future__ import annotations

from ._controller import SurgeryController
from ._diagnosis import conflicts, cosine_matrix, describe
from ._gramian import gramian
from ._settings import Surgery
from ._split import collecting, split
from ._tap import TrainingStepTap
from ._weights import METHODS, weights

__all__ = [
    "METHODS",
    "Surgery",
    "SurgeryController",
    "TrainingStepTap",
    "collecting",
    "conflicts",
    "cosine_matrix",
    "describe",
    "gramian",
    "split",
    "weights",
]
