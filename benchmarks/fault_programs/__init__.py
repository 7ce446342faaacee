"""Faulty training programs with their fixed twins, and healthy ones: what the rules are judged by."""

from __future__ import annotations

from ._autotrainer import AUTOTRAINER
from ._before import BY_CONSTRUCTION, Checked, check_all
from ._controls import CONTROLS as _CONTROLS
from ._controls_loops import CONTROL_LOOPS
from ._deepchecker import DEEP_CHECKER
from ._diagnoses import DIAGNOSES, is_diagnosed
from ._loops import LOOPS
from ._program import Problem, Program
from ._score import PEERS, Score, manifests, score
from ._stackoverflow import STACK_OVERFLOW
from ._stackoverflow_regression import STACK_OVERFLOW_REGRESSION
from ._training import Run, Unwatched, batches, run

__all__ = [
    "BY_CONSTRUCTION",
    "CONTROLS",
    "DIAGNOSES",
    "FAULTY",
    "PEERS",
    "PROGRAMS",
    "Checked",
    "Problem",
    "Program",
    "Run",
    "Score",
    "Unwatched",
    "batches",
    "check_all",
    "is_diagnosed",
    "manifests",
    "run",
    "score",
]

FAULTY: tuple[Program, ...] = AUTOTRAINER + STACK_OVERFLOW + STACK_OVERFLOW_REGRESSION + DEEP_CHECKER + LOOPS
"""The 67 published programs, each with a faulty and a fixed twin."""

CONTROLS: tuple[Program, ...] = _CONTROLS + CONTROL_LOOPS
"""Healthy programs."""

PROGRAMS: dict[str, Program] = {p.name: p for p in FAULTY + CONTROLS}
"""By name."""
