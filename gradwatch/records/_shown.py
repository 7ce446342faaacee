"""Incidents and records as a notebook shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .._markup import card, escape, number, table, told
from ._columns import column_of, heading

if TYPE_CHECKING:
    from ._causes import Ranked
    from ._incident import Incident
    from ._step import StepRecord

__all__ = ["MOST_PATHS", "incident_html", "incidents_html", "record_html", "record_text"]

MOST_PATHS = 40
"""Rows of a record's table."""

COLUMNS = ("grad_norm", "grad_absmax", "zero_fraction", "nonfinite_count", "param_norm", "update_ratio")
"""Shown of a record, where they were measured."""


def incident_html(incident: Incident) -> str:
    """Return one incident: what, when, where, the numbers, what was done and what to do."""
    facts = [
        ("step", _when(incident)),
        ("where", escape(_where(incident))),
        ("seen", escape(incident.seen or number(incident.value))),
        ("bar", "" if np.isnan(incident.limit) else escape(number(incident.limit))),
        ("done", escape(", ".join(incident.done))),
        ("what to do", escape(incident.advice)),
    ]
    rows = [(f"<b>{name}</b>", text) for name, text in facts if text]
    name = incident.name or incident.rule
    known = [(f"<b>{escape(head)}</b>", escape(text)) for head, text in incident.case.lines()] if incident.case else []
    case = f"<details><summary>case file</summary>{table(('', ''), known)}</details>" if known else ""
    return card(f"{name} ({incident.severity}, {_state(incident)})", incident.severity, table(("", ""), rows), case)


def incidents_html(ranked: Sequence[Ranked]) -> str:
    """Return incidents as a table, each below what it follows from."""
    if not ranked:
        return "<div>no incidents</div>"
    rows = [
        (
            _when(incident),
            told(incident.severity, incident.severity),
            ("" if cause is None else "↳ ") + f"<code>{escape(incident.name or incident.rule)}</code>",
            escape(_where(incident)),
            escape(incident.seen or number(incident.value)),
            escape(", ".join(incident.done)) or "-",
            _state(incident),
        )
        for incident, cause in ranked
    ]
    return table(("step", "severity", "what", "where", "seen", "done", "state"), rows)


def _when(incident: Incident) -> str:
    first, last = incident.first_step, incident.last_step
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _where(incident: Incident) -> str:
    more = f" and {len(incident.paths) - 1} more" if len(incident.paths) > 1 else ""
    return (incident.first_path or "whole model") + more


def _state(incident: Incident) -> str:
    return (
        "open" if not incident.resolved else f"over at {incident.resolved_step:,}" if incident.resolved_step else "over"
    )


def record_text(record: StepRecord) -> str:
    """Return what one step was like, in a few lines."""
    lines = [_headline(record), *_norms(record)]
    lines += [
        f"{t.name}{f' behind {t.rule}' if t.rule else ''}: {_done(t.before, t.after)}"
        for t in record.treatments
        if t.applied
    ]
    names = ", ".join(record.columns) or "none"
    lines.append(f"columns: {names}; {len(record.index)} paths, {len(record.histograms)} histograms")
    return "\n".join(lines)


def record_html(record: StepRecord) -> str:
    """Return what one step was like: norms, what was done, and a table of its parameters."""
    lines = [*_norms(record)]
    lines += [
        f"{t.name}{f' behind {t.rule}' if t.rule else ''}: {_done(t.before, t.after)}"
        for t in record.treatments
        if t.applied
    ]
    said = "".join(f"<div>{escape(line)}</div>" for line in lines)
    more = table(
        ("number", "value"), ((f"<code>{escape(k)}</code>", escape(number(v))) for k, v in record.scalars.items())
    )
    scalars = (
        f"<details><summary>{len(record.scalars)} numbers of the step</summary>{more}</details>"
        if record.scalars
        else ""
    )
    return card(_headline(record), "critical" if _is_broken(record) else "good", said, _layers(record), scalars)


def _headline(record: StepRecord) -> str:
    place = [f"step {record.step:,}"]
    place += [
        f"{name} {value:,}" for name, value in (("epoch", record.epoch), ("batch", record.batch_idx)) if value >= 0
    ]
    loss = f", loss {number(record.loss)}" if record.has_loss else ""
    return f"{', '.join(place)}{loss}{', skipped' if record.skipped else ''}"


def _is_broken(record: StepRecord) -> bool:
    numbers = [record.loss] if record.has_loss else []
    numbers += [record.global_norm] if record.has_gradient else []
    return not np.isfinite(numbers).all()


def _norms(record: StepRecord) -> Iterable[str]:
    if not record.has_gradient:
        return ["no gradient was seen"]
    said = [f"global gradient norm: {number(record.global_norm)} as produced"]
    if record.global_norm_after != record.global_norm and np.isfinite(record.global_norm_after):
        said.append(f"{number(record.global_norm_after)} after treatment")
    applied = record.global_norm_applied
    if applied is not None:
        said.append(f"{number(applied)} as the optimizer got it")
    return [", ".join(said)]


def _done(before: float, after: float) -> str:
    return (
        f"global norm {number(before)} to {number(after)}" if np.isfinite(after) else f"at global norm {number(before)}"
    )


def _layers(record: StepRecord) -> str:
    names = [name for name in COLUMNS if name in record.columns]
    rows = np.flatnonzero(record.index.is_parameter)
    rows = rows[np.argsort(record.index.depth[rows], kind="stable")]
    if not names or not len(rows):
        return ""
    shown = rows[:MOST_PATHS]
    cells = [
        [f"<code>{escape(record.index.paths[i])}</code>", *(_cell(record, name, i) for name in names)]
        for i in shown.tolist()
    ]
    left = f"<div>and {len(rows) - len(shown):,} more parameters</div>" if len(rows) > len(shown) else ""
    return table(("parameter", *(_titled(name) for name in names)), cells) + left


def _titled(name: str) -> str:
    known = column_of(name)
    return heading(name) + (f" ({known.unit})" if known is not None and known.unit else "")


def _cell(record: StepRecord, name: str, place: int) -> str:
    return escape(number(float(record.columns[name][place]))) if record.measured(name)[place] else "-"
