"""What will break next: measurements that lead the loss. The preset of rules `"ahead"` reads them."""

from __future__ import annotations

from ._curvature import StepCurvature
from ._sharpness import Sharpness, sharpness
from ._statistics import AdamUpdateRms, GradientTurn

__all__ = ["AdamUpdateRms", "GradientTurn", "Sharpness", "StepCurvature", "sharpness"]
