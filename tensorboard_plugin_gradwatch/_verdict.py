"""The verdict on a run, from what its event files hold: the same function as everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from gradwatch.records import GOING_ON, Incident, RuleCoverage, Verdict, judge_run, rank_incidents

from ._catalogue import Source
from ._shown import Table

__all__ = ["in_order", "verdict_of"]


def verdict_of(
    incidents: Sequence[Mapping[str, Any]], judged: Sequence[tuple[int, Any]], source: Source, headline: Table
) -> Verdict:
    """Return the verdict.

    Args:
        incidents: as they stand now, as JSON.
        judged: what the run said at its end of what its rules judged; with the step. One that was written before the
            newest record is an earlier session's.
        source: that all is of.
        headline: the global norm and other numbers, step by step.
    """
    known = []
    for data in incidents:
        with suppress(Exception):  # a damaged one is not left out: something was said
            known.append(Incident.from_json({**data, "severity": str(data.get("severity", "warning"))}))
            continue
        known.append(Incident(rule=str(data.get("rule")), first_step=0, last_step=0))
    told: Any = judged[-1][1] if judged and judged[-1][0] >= source.stamp[0] else None
    logged = len(headline.steps)
    if not isinstance(told, Mapping) or not isinstance(told.get("coverage"), list):
        return judge_run(incidents=known, coverage=None, num_steps=logged, ended=GOING_ON)
    coverage = [entry for entry in map(RuleCoverage.from_json, told["coverage"]) if entry is not None]
    num_steps, ended = told.get("num_steps"), told.get("ended")
    return judge_run(
        incidents=known,
        coverage=coverage,
        num_steps=num_steps if isinstance(num_steps, int) else logged,
        ended=ended if isinstance(ended, str) else "unknown",
    )


def in_order(incidents: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return incidents, as JSON, each behind what it follows from; as they are where a log holds something else."""
    try:
        known = [Incident.from_json(data) for data in incidents]
        ranked = rank_incidents(known)
    except (TypeError, ValueError):
        return incidents
    places = {id(incident): place for place, incident in enumerate(known)}
    return [incidents[places[id(incident)]] for incident, _ in ranked]
