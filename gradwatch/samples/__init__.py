"""Which samples of a batch made its gradient: losses, norms and shares sample by sample."""

from __future__ import annotations

from ..records import Sample
from ._apart import Begun, take_apart
from ._functional import per_sample_gradients
from ._losses import LossCall, loss_function, matching_losses
from ._result import PerSample

__all__ = [
    "Begun",
    "LossCall",
    "PerSample",
    "Sample",
    "loss_function",
    "matching_losses",
    "per_sample_gradients",
    "take_apart",
]
