"""Whether a training has company: others that step in between, and move the level that its loss is measured by."""

from __future__ import annotations

from ..records import StepRecord

__all__ = ["COMPANY", "has_company"]

COMPANY = frozenset({"optimizer", "others_step"})
"""Scalars that tell of it."""


def has_company(record: StepRecord) -> bool:
    """Return whether other optimizers, or other watched trainings, step in turns with this one: a generator and its
    critic, an actor and a critic."""
    return not COMPANY.isdisjoint(record.scalars)
