"""Checks before step 0: what can be known of a model, a batch, a loss and an optimizer without training.

Public as `gradwatch.preflight` and `gradwatch.check_lightning`.
"""

from __future__ import annotations

from ._lightning import check_lightning
from ._preflight import CHECKS, preflight
from ._report import PreflightFinding, PreflightReport
from ._snapshot import unchanged
from ._task import Task

__all__ = ["CHECKS", "PreflightFinding", "PreflightReport", "Task", "check_lightning", "preflight", "unchanged"]
