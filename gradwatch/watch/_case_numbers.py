"""The numbers of a case file, out of the recent records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf, isfinite, nan
from typing import Any

import numpy as np

from ..records import CaseFile, CaseHistogram, CaseLayer, CaseTreatment, Incident, Sample, StepRecord
from ._alarmed import MAX_HISTOGRAMS, Alarmed, paths_of
from ._autopsy import Autopsy

__all__ = ["LONGEST_LOOK", "gathered", "with_ids"]

AROUND = 32
"""Records before an incident, and at most as many after its beginning, that its curves show."""
LONGEST_LOOK = 320
"""Records that are looked through for the last histogram before it."""
MAX_LAYERS = 8
MAX_MODULES = 48


def gathered(incident: Incident, history: Sequence[StepRecord], autopsy: Autopsy | None, alarmed: Alarmed) -> CaseFile:
    """Return a case file with what records say of an incident.

    Args:
        incident: as it stands.
        history: the recent records, oldest first.
        autopsy: the last one.
        alarmed: histograms that alarms had taken.
    """
    first = incident.first_step
    before = [r for r in history if r.step < first][-AROUND:]
    since = [r for r in history if r.step >= first][:AROUND]
    at = since[0] if since and since[0].step == first else None
    layers = _layers(before, at, incident.worst_path or "")
    born = str(incident.details.get("born_in", ""))
    return CaseFile(
        rule=incident.rule,
        name=incident.name,
        id=incident.id,
        step=first,
        value=float(incident.value),
        bar=float(incident.limit),
        worst_path=incident.worst_path or "",
        worst_step=-1 if incident.worst_step is None else incident.worst_step,
        epoch=-1 if at is None else at.epoch,
        batch_idx=-1 if at is None else at.batch_idx,
        num_samples=0 if at is None else at.num_samples,
        steps=tuple(r.step for r in (*before, *since)),
        curves=_curves([*before, *since]),
        layers=layers,
        samples=tuple(map(Sample.from_json, incident.details.get("samples", ()))),
        num_micro_batches=int(incident.details.get("samples_micro_batches", 1)),
        histograms=tuple(_histograms(_paths(incident, layers, at), first, history, alarmed)),
        born_in=born,
        phase=str(incident.details.get("phase", "")),
        modules=_modules(born, autopsy),
        treatments=tuple(_treatments([*before, *since])),
        flight_recorder=str(incident.details.get("flight_recorder", "")),
    )


def with_ids(case: CaseFile, ids: Sequence[int | str], how: str) -> CaseFile:
    """Return the case with the ids of its samples, those that carry the gradient among them, and who told them."""
    size = len(ids) // case.num_micro_batches  # all but the last batch of an epoch are equal
    samples = list(case.samples)
    for number, sample in enumerate(samples):
        place = sample.micro_batch * size + sample.index
        if sample.rank == case.rank and sample.index < size and place < len(ids):
            samples[number] = replace(sample, dataset_index=ids[place])
    return replace(case, sample_ids=tuple(ids), samples_from=how, samples=tuple(samples))


def _curves(records: Sequence[StepRecord]) -> dict[str, tuple[float, ...]]:
    rows = [
        {
            "loss": r.loss if r.has_loss else nan,
            "lr": r.lr,
            "global_norm": r.global_norm,
            "global_norm_after": r.global_norm_after,
            "global_norm_applied": r.scalars.get("global_norm_applied", nan),
            "accepted": r.scalars.get("limit", nan),
            "limit": _clip_of(r),
        }
        for r in records
    ]
    curves = {name: tuple(float(row[name]) for row in rows) for name in (rows[0] if rows else ())}
    return {name: values for name, values in curves.items() if not np.isnan(values).all()}


def _clip_of(record: StepRecord) -> float:
    """Return the smallest norm that a treatment said it clips to at this step; nan where none did."""
    stated = [t.values[name] for t in record.treatments for name in ("limit", "max_norm") if name in t.values]
    smallest = min((float(v) for v in stated if isinstance(v, (int, float)) and isfinite(v)), default=inf)
    return smallest if isfinite(smallest) else nan


def _layers(before: Sequence[StepRecord], at: StepRecord | None, worst_path: str) -> tuple[CaseLayer, ...]:
    """Return the parameter that the rule's number is of, and those whose gradients are furthest above their own level;
    what is not finite is furthest."""
    if at is None or "grad_norm" not in at.columns:
        return ()
    index = at.index
    rows = np.flatnonzero(at.measured("grad_norm") & index.is_parameter)
    now = at.columns["grad_norm"][rows]
    known = [r.columns["grad_norm"][rows] for r in before if r.index is index and "grad_norm" in r.columns]
    level = np.full(len(rows), nan)
    if known:
        stacked = np.stack(known)
        stacked = np.where(np.isfinite(stacked), stacked, nan)
        told = ~np.isnan(stacked).all(axis=0)
        level[told] = np.nanmedian(stacked[:, told], axis=0)
    with np.errstate(all="ignore"):
        growth = np.where(level > 0, now / level, now)
    growth = np.where([index.paths[row] == worst_path for row in rows.tolist()], inf, growth)
    order = np.argsort(-np.nan_to_num(growth, nan=inf, posinf=inf), kind="stable")[:MAX_LAYERS]
    return tuple(CaseLayer(index.paths[rows[i]], float(level[i]), float(now[i])) for i in order.tolist())


def _paths(incident: Incident, layers: Sequence[CaseLayer], at: StepRecord | None) -> list[str]:
    """Return the parameters that an incident is of, those of its modules among them; the farthest from their level
    where it is of the whole model."""
    if at is None:
        return [layer.path for layer in layers][:MAX_HISTOGRAMS]
    index = at.index
    is_parameter = dict(zip(index.paths, index.is_parameter.tolist(), strict=True))
    found: list[str] = []
    for path in paths_of(incident):
        if is_parameter.get(path):
            found.append(path)
        else:
            found += [p for p in index.paths if p.startswith(f"{path}.") and is_parameter[p]][:1]
    found += [layer.path for layer in layers]
    return list(dict.fromkeys(found))[:MAX_HISTOGRAMS]


def _histograms(
    paths: Sequence[str], first: int, history: Sequence[StepRecord], alarmed: Alarmed
) -> Iterator[CaseHistogram]:
    measured = sorted({**{r.step: r.histograms for r in history if r.histograms}, **alarmed}.items())
    earlier = [m for m in reversed(measured) if m[0] < first]
    now = [m for m in measured if m[0] == first]
    later = [m for m in measured if m[0] > first]
    for path in paths:
        for when, some in (("before", earlier), ("at", now), ("after", later)):
            step, found = next(((s, h[path]) for s, h in some if path in h), (-1, None))
            if found is not None:
                yield CaseHistogram(when, step, path, found)


def _modules(born: str, autopsy: Autopsy | None) -> tuple[Mapping[str, Any], ...]:
    """Return the rows of an autopsy about where it was born; the flight recorder has them all."""
    if autopsy is None or not born:
        return ()
    place = next((i for i, row in enumerate(autopsy.modules) if row["path"] == born), 0)
    start = max(0, place - MAX_MODULES // 2)
    return tuple(autopsy.modules[start : start + MAX_MODULES])


def _treatments(records: Sequence[StepRecord]) -> Iterator[CaseTreatment]:
    for record in records:
        for report in record.treatments:
            if report.applied:
                yield CaseTreatment(record.step, report.name, report.rule, report.before, report.after)
