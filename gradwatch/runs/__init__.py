"""Runs read back: run folders, logs of other programs, replay and comparison."""

from __future__ import annotations

from ._compare import Comparison, LayerDifference, compare
from ._log import Log, read_log
from ._recorded import Recorded
from ._replay import Replay, replay
from ._run import Run, find_runs, read_run

__all__ = [
    "Comparison",
    "LayerDifference",
    "Log",
    "Recorded",
    "Replay",
    "Run",
    "compare",
    "find_runs",
    "read_log",
    "read_run",
    "replay",
]
