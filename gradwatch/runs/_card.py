"""A run on record as a notebook shows it: columns are read a part at a time, and pooled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..notebook import RunCard, Series

if TYPE_CHECKING:
    from ._recorded import Recorded

__all__ = ["card_of"]


def card_of(run: Recorded, where: str) -> RunCard:
    """Return the card of a run.

    Args:
        run: read from a folder or a log.
        where: it lies.
    """
    steps = run.steps()
    verdict, incidents = run.verdict(), run.incidents
    if not len(steps):
        return RunCard.of(verdict, Series(), incidents, facts=[where])
    series = Series.over(steps, run.index)
    for name in Series.NAMES:
        if name in run.scalars:
            series.put(name, *run.scalar(name))
    if "grad_norm" in run.columns:
        for when, values, measured in run.parts("grad_norm"):
            series.put_norms(when, values, measured)
    facts = [f"{where}: {len(steps):,} records, steps {steps[0]:,} to {steps[-1]:,}"]
    return RunCard.of(verdict, series, incidents, facts=facts)
