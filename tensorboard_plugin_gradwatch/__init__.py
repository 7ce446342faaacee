"""The GradWatch tab of TensorBoard. Needs tensorboard and numpy; never imports torch."""

from __future__ import annotations

__all__: list[str] = []
