"""Runs read back: run folders, logs of other programs, replay and comparison."""

from __future__ import annotations

from ._compare import Comparison, LayerDifference, compare
from ._folder import may_hold_run
from ._health import Health
from ._log import Log, read_log
from ._recorded import Recorded
from ._replay import Replay, replay
from ._run import Run, find_runs, read_run
from ._verdict import verdict

__all__ = [
    "Comparison",
    "Health",
    "LayerDifference",
    "Log",
    "Recorded",
    "Replay",
    "Run",
    "compare",
    "find_runs",
    "may_hold_run",
    "read_log",
    "read_run",
    "replay",
    "verdict",
]
