"""The table at the end of a fit: layer by layer what was seen, then what went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from .._text import printable
from ..records import (
    HEALTHY,
    Floats,
    Incident,
    StepRecord,
    Verdict,
    cost_of_steps,
    heading,
    kinds_in,
    rank_incidents,
    told_kinds,
)

__all__ = ["summarize"]

MAX_LAYERS = 40
LEAST_LAYERS = 8
STEPS_A_LAYER = 12
"""A short run has a short summary: one line of the table for so many steps."""


def summarize(
    history: Sequence[StepRecord],
    incidents: Sequence[Incident],
    *,
    verdict: Verdict,
    num_skipped: int = 0,
    remarks: Iterable[str] = (),
    notes: Iterable[str] = (),
    why_nothing: str = "",
    max_layers: int | None = None,
) -> str:
    """Return a table of the recent records, one line per parameter of two or more dimensions, then the incidents.

    Args:
        history: recent records, oldest first.
        incidents: of the whole run.
        verdict: on it.
        num_skipped: optimizer steps that were vetoed.
        remarks: what is to be known of the norms on record.
        notes: what gradwatch could not see, or switched off.
        why_nothing: why there is no record, where there is none.
        max_layers: lines of the table; the layers with the smallest and largest gradients stay. None: as the length
            of the run deserves.
    """
    if not history:
        lines = [f"gradwatch: no step was measured{': ' if why_nothing else ''}{why_nothing}."]
        return printable("\n".join([*lines, *(f"note: {_flat(note)}" for note in notes)]))
    last = history[-1]
    lines = [f"gradwatch: {len(history)} records, steps {history[0].step} to {last.step}", verdict.headline]
    lines += filter(None, [told_kinds(kinds_in(last.scalars))])
    lines += _table(history, max_layers or min(MAX_LAYERS, max(LEAST_LAYERS, len(history) // STEPS_A_LAYER)))
    norms = np.asarray([r.global_norm for r in history if r.has_gradient])
    said = f"median {_short(_median(norms))}, largest {_short(_max(norms))}" if len(norms) else "not seen at any step"
    lines.append(f"global gradient norm: {said}")
    treated = sum(any(t.applied for t in r.treatments) for r in history)
    if treated or num_skipped:
        lines.append(f"treated steps: {treated} of the last {len(history)}; skipped in all: {num_skipped}")
    lines += remarks
    lines += _cost(history)
    if incidents:
        lines.append(f"{len(incidents)} incident{'s' if len(incidents) > 1 else ''}:")
        for incident, cause in rank_incidents(incidents):
            state = "resolved" if incident.resolved else "open"
            follows = "" if cause is None else f"  follows from {cause.name or cause.rule}: "
            lines.append(f"  {follows}{_flat(str(incident))} [{state}]")
            if incident.advice and cause is None:
                lines.append(f"      {incident.advice}")
    elif verdict.state == HEALTHY:
        lines.append("no incidents.")
    lines += [f"note: {_flat(note)}" for note in (*notes, *_idle(verdict))]
    return printable("\n".join(lines))


def _idle(verdict: Verdict) -> list[str]:
    """Count the rules that had nothing to judge: a list of them would be longer than all else."""
    idle = [entry for entry in verdict.coverage if not entry.judged and entry.reason and not entry.disabled]
    told = f"{len(idle)} of {len(verdict.coverage)} rules had nothing to judge"
    return [f"{told} (`verdict().unjudged` says what each lacks)"] if idle else []


def _cost(history: Sequence[StepRecord]) -> list[str]:
    spent = np.asarray([r.scalars.get("overhead_seconds", np.nan) for r in history])
    cost = cost_of_steps(np.asarray([r.step for r in history]), np.asarray([r.time for r in history]), spent)
    return [f"gradwatch itself: {cost}"] if cost else []


def _flat(text: str) -> str:
    """Return a text on one line: names in it may hold line ends."""
    return " ".join(text.split("\n"))


def _table(history: Sequence[StepRecord], max_layers: int) -> list[str]:
    index = history[-1].index
    rows = np.flatnonzero(index.is_parameter & index.in_optimizer & (index.ndim >= 2))
    if not len(rows):
        rows = np.flatnonzero(index.is_parameter & index.in_optimizer)
    rows = rows[np.argsort(index.depth[rows], kind="stable")]
    norms = _column(history, "grad_norm", len(index))
    ratios = _column(history, "update_ratio", len(index))
    median, top = _median(norms, axis=0), _max(norms, axis=0)
    shown = rows
    if len(rows) > max_layers:
        order = rows[np.argsort(np.nan_to_num(median[rows], nan=np.inf))]
        keep = {*order[: max_layers // 2].tolist(), *order[-(max_layers - max_layers // 2) :].tolist()}
        shown = np.asarray([i for i in rows if i in keep])
    width = min(max((len(index.paths[i]) for i in shown), default=10), 32)
    norm, ratio = heading("grad_norm"), heading("update_ratio")
    head = f"{'parameter':<{width}}  {norm:>13} {'median':>9} {'largest':>9} {ratio:>12}"
    lines = [head]
    for i in shown:
        path = _flat(index.paths[i])
        path = path if len(path) <= width else "..." + path[3 - width :]
        cells = [_short(norms[-1, i]), _short(median[i]), _short(top[i])]
        ratio = _short(_median(ratios[:, i])) if np.isfinite(ratios[:, i]).any() else "-"
        lines.append(f"{path:<{width}}  {cells[0]:>13} {cells[1]:>9} {cells[2]:>9} {ratio:>12}")
    if len(rows) > len(shown):
        lines.append(f"... and {len(rows) - len(shown)} layers between these")
    return lines


def _column(history: Sequence[StepRecord], name: str, size: int) -> Floats:
    out = np.full((len(history), size), np.nan)
    for t, record in enumerate(history):
        if name in record.columns and len(record.index) == size:
            out[t] = np.where(record.measured(name), record.columns[name], np.nan)
    return out


def _median(values: Floats, axis: int | None = None) -> Floats:
    with np.errstate(all="ignore"):
        finite = np.where(np.isfinite(values), values, np.nan)
        return np.asarray(_quiet(np.nanmedian, finite, axis))


def _max(values: Floats, axis: int | None = None) -> Floats:
    # nan is a result: a layer that was once non-finite shows it.
    bad = np.isinf(values)
    top = np.asarray(_quiet(np.nanmax, np.where(bad, np.nan, values), axis))
    return np.where(bad.any(axis=axis), np.inf, top)


def _quiet(reduce: object, values: Floats, axis: int | None) -> Floats:
    empty = np.isnan(values).all(axis=axis)
    filled = np.where(np.isnan(values).all(axis=axis, keepdims=True), 0.0, values)
    return np.where(empty, np.nan, reduce(filled, axis=axis))  # type: ignore[operator]


def _short(value: float | Floats) -> str:
    number = float(value)
    return "-" if np.isnan(number) else f"{number:.3g}"
