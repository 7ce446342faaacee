"""The optimizers' own steps, as `Watch.step` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._clean import steps_undisturbed
from ._engine import Engine, StepOutcome
from ._stepper import Stepper

__all__ = ["step_all"]


def step_all(stepping: Sequence[Stepper], scaler: Any, engine: Engine, outcome: StepOutcome) -> None:
    """Let optimizers step, through the loss scaler where there is one, which is updated then.

    Those whose gates hear nothing of their steps are left out of a vetoed one.
    """
    # One inside a wrapper is the wrapper's to step and update.
    mine = None if scaler is None or any(s.scaler is not None for s in stepping) else scaler
    engine.ends_at_once = True
    if mine is None and len(stepping) == 1 and not outcome.requests:
        engine.delivered.is_next = stepping[0].given is stepping[0].raw and steps_undisturbed(stepping[0].raw)
    try:
        for s in stepping:
            if engine.gates.is_open(s.raw):
                if outcome.skip:
                    continue
                engine.delivered.stepping(s.raw)
            if mine is not None:
                mine.step(s.given)
            else:
                s.given.step()
        if mine is not None:
            mine.update()
    except BaseException:
        engine.gates.over()
        engine.broke_off()
        raise
    finally:
        engine.ends_at_once = False
