"""The names of case files and of what lies beside them."""

from __future__ import annotations

from .._text import file_name
from ..records import CaseFile

__all__ = ["CASES", "batch_name", "case_name"]

CASES = "case-*.json"
"""The pattern of case files in a run folder."""


def case_name(case: CaseFile) -> str:
    """Return the name of a case's file: the same one in whichever session it is written."""
    return f"case-{_mark(case)}.json"


def batch_name(case: CaseFile) -> str:
    """Return the name of the file of a case's batch."""
    return f"batch-{_mark(case)}.safetensors"


def _mark(case: CaseFile) -> str:
    return f"{case.step:06d}-{file_name(case.name or case.rule)}-{case.id}"
