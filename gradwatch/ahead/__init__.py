"""What will break next: measurements that lead the loss. The preset of rules `"ahead"` reads them."""

from __future__ import annotations

from ._curvature import StepCurvature
from ._dormant import DormantUnits
from ._effective_rank import EffectiveRank
from ._sharpness import Sharpness, sharpness
from ._spectra import WeightSpectra
from ._statistics import AdamUpdateRms, GradientTurn

__all__ = [
    "AdamUpdateRms",
    "DormantUnits",
    "EffectiveRank",
    "GradientTurn",
    "Sharpness",
    "StepCurvature",
    "WeightSpectra",
    "sharpness",
]
