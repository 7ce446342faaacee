"""The engine's memory, as plain values and tensors (they load with `weights_only=True`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ._run_treatments import load_treatments

if TYPE_CHECKING:
    from ._engine import Engine

__all__ = ["memory_of", "remember"]


def memory_of(engine: Engine) -> dict[str, Any]:
    """Return what an engine must know to go on where it was."""
    return {
        "judge": engine.judge.state_dict(),
        "treatments": [t.state_dict() for t in engine.all_treatments],
        "treatment_names": [t.name for t in engine.all_treatments],
        "rates": engine.rates.state_dict(),
        "limits": {str(i): list(limit) for i, limit in engine.completion.limits.items()},
        "num_skipped": engine.completion.num_skipped,
        "num_overflows": engine.completion.num_overflows,
        **({} if engine.rollbacks is None else {"rollbacks": engine.rollbacks.state_dict()}),
    }


def remember(engine: Engine, state: Mapping[str, Any]) -> None:
    """Give an engine its memory back; treatments that are not the saved ones start afresh, with a warning.

    Nothing of it is left behind where a part of it raises: see `Session.load_state_dict`.
    """
    engine.judge.load_state_dict(state.get("judge", {}))
    load_treatments(engine.all_treatments, state.get("treatments", []), state.get("treatment_names"), engine.guard)
    engine.rates.load_state_dict(state.get("rates", {}))
    limits = state.get("limits", {})
    engine.completion.limits = {int(i): (int(stretch), float(limit)) for i, (stretch, limit) in limits.items()}
    engine.completion.num_skipped = int(state.get("num_skipped", 0))
    engine.completion.num_overflows = int(state.get("num_overflows", 0))
    if engine.rollbacks is not None:
        engine.rollbacks.load_state_dict(state.get("rollbacks", {}))
