"""The table at the end of a fit: layer by layer what was seen, then what went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..records import Floats, Incident, StepRecord

__all__ = ["summarize"]

MAX_LAYERS = 40


def summarize(
    history: Sequence[StepRecord],
    incidents: Sequence[Incident],
    *,
    num_skipped: int = 0,
    notes: Iterable[str] = (),
    max_layers: int = MAX_LAYERS,
) -> str:
    """Return a table of the recent records, one line per parameter of two or more dimensions, then the incidents.

    Args:
        history: recent records, oldest first.
        incidents: of the whole run.
        num_skipped: optimizer steps that were vetoed.
        notes: what gradwatch could not see, or switched off.
        max_layers: lines of the table; the layers with the smallest and largest gradients stay.
    """
    if not history:
        return "gradwatch: no step was measured."
    last = history[-1]
    lines = [f"gradwatch: {len(history)} records, steps {history[0].step} to {last.step}"]
    lines += _table(history, max_layers)
    norms = np.asarray([r.global_norm for r in history])
    lines.append(f"global gradient norm: median {_short(_median(norms))}, max {_short(_max(norms))}")
    treated = sum(any(t.applied for t in r.treatments) for r in history)
    if treated or num_skipped:
        lines.append(f"treated steps: {treated} of the last {len(history)}; skipped in all: {num_skipped}")
    if "trainer_clip" in last.scalars:
        lines.append(
            f"the Trainer clips after gradwatch, to {_short(last.scalars['trainer_clip'])}: the norm the optimizer "
            "gets is on record as global_norm_applied"
        )
    if incidents:
        lines.append(f"{len(incidents)} incident{'s' if len(incidents) > 1 else ''}:")
        for incident in incidents:
            state = "resolved" if incident.resolved else "open"
            lines.append(f"  {incident} [{state}]")
            if incident.advice:
                lines.append(f"      {incident.advice}")
    else:
        lines.append("no incidents.")
    lines += [f"note: {note}" for note in notes]
    return "\n".join(lines)


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
    width = min(max((len(index.paths[i]) for i in shown), default=10), 48)
    head = f"{'parameter':<{width}}  {'grad norm':>10} {'median':>10} {'max':>10} {'update/weight':>13}"
    lines = [head]
    for i in shown:
        path = index.paths[i] if len(index.paths[i]) <= width else "..." + index.paths[i][3 - width :]
        cells = [_short(norms[-1, i]), _short(median[i]), _short(top[i])]
        ratio = _short(_median(ratios[:, i])) if np.isfinite(ratios[:, i]).any() else "-"
        lines.append(f"{path:<{width}}  " + " ".join(f"{c:>10}" for c in cells) + f" {ratio:>13}")
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
