"""The GradWatch tab of TensorBoard. Needs tensorboard and numpy; never imports torch.

The names here need numpy alone: the report pools its pictures as the tab does, and draws them with the same scripts.
"""

from __future__ import annotations

from pathlib import Path

from ._ridge import exponent_row, magnitudes, ridge
from ._wire import MISSING, Matrix, Steps, pool, sizes

__all__ = ["MISSING", "STATIC", "Matrix", "Steps", "exponent_row", "magnitudes", "pool", "ridge", "sizes"]

STATIC = Path(__file__).parent / "static"
"""Scripts and style sheets."""
