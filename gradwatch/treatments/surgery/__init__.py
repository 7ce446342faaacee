"""Gradient surgery between the tasks of a batch, and the diagnosis of their conflicts.

`weights` is the bare mathematics (a Gramian in, weights out), `Surgery` the settings, `split` what a training step
calls, `SurgeryController` what an engine drives.
"""

from __future__ import annotations

from ._controller import SurgeryController
from ._diagnosis import conflicts, describe
from ._micro import MicroBatchController, MicroBatchSurgery
from ._noise import agreement_filter, micro_agreement, noise_moments
from ._settings import Surgery
from ._split import collecting, split
from ._tap import TrainingStepTap
from ._weights import METHODS, weights

__all__ = [
    "METHODS",
    "MicroBatchController",
    "MicroBatchSurgery",
    "Surgery",
    "SurgeryController",
    "TrainingStepTap",
    "agreement_filter",
    "collecting",
    "conflicts",
    "describe",
    "micro_agreement",
    "noise_moments",
    "split",
    "weights",
]
