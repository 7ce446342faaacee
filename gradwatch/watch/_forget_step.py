"""For trainers that do not say which backward of a step is the last: measuring a step once more."""

from __future__ import annotations

from ._engine import Engine

__all__ = ["forget_step"]


def forget_step(engine: Engine) -> None:
    """Forget what was measured of the present step: its gradient has grown since."""
    engine._current = engine._measured = None
    engine.after_the_step.drop()
