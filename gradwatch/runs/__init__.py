"""Runs read back: run folders, logs of other programs, replay and comparison."""

from __future__ import annotations

from ._run import Run, find_runs, read_run

__all__ = ["Run", "find_runs", "read_run"]
