"""All that a report shows, from a run folder or from live objects.

Shapes: T steps, N paths of the index.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorboard_plugin_gradwatch import pool, sizes

from ..protocols import RunMeta
from ..records import Floats, Incident, Index, StepRecord, TreatmentReport, Verdict, iter_scalars
from ..runs import Run

__all__ = ["COLUMNS", "ReportData", "Table", "TreatmentCount"]

COLUMNS = 1200
"""Points kept of each statistic: as many as a wide screen shows."""


@dataclass(frozen=True, eq=False)
class Table:
    """A statistic over steps and paths, pooled to at most `COLUMNS` steps; `MISSING` (-inf): not measured.

    Attributes:
        steps: float64 (T,).
        values: float32 (T, N).
        measured: steps before pooling.
        last: the last step measured.
    """

    steps: Floats
    values: NDArray[np.float32]
    measured: int
    last: float


@dataclass(kw_only=True)
class TreatmentCount:
    """How often a treatment changed something, and how much it left at the strongest."""

    name: str
    rule: str = ""
    count: int = 0
    first_step: int = -1
    last_step: int = -1
    least_share: float = 1.0

    def add(self, step: int, before: float, after: float) -> None:
        self.count += 1
        self.first_step = step if self.first_step < 0 else self.first_step
        self.last_step = step
        if before > 0 and math.isfinite(before) and math.isfinite(after):
            self.least_share = min(self.least_share, after / before)


@dataclass(frozen=True, eq=False, kw_only=True)
class ReportData:
    """All that a report shows.

    Attributes:
        name: of the run, as its title.
        meta: plain values: `model`, `started`, `versions`, `options`.
        index: of all tables.
        tables: column -> `Table`.
        scalars: name -> steps (T,), values (T,). `limit` is the rules' bar, `clip_limit` what treatments kept to.
        histograms: parameter path -> steps (T,), exponent counts (T, 512).
        incidents: in order of their first step.
        treatments: what was done, in order of the first time.
        first_step, last_step, num_steps: of the records.
        num_skipped: steps at which nothing moved.
        notes: what could not be seen, in sentences.
        overhead_seconds: spent by gradwatch; nan where not measured.
        total_seconds: of the run, between the first and the last record.
        verdict: on the run; None: nobody has told what its rules judged.
        folder: of the run, as it was given; "" where it has none.
    """

    name: str = "run"
    meta: Mapping[str, Any] = field(default_factory=dict)
    index: Index = field(default_factory=lambda: Index.of_parameters(()))
    tables: Mapping[str, Table] = field(default_factory=dict)
    scalars: Mapping[str, tuple[Floats, Floats]] = field(default_factory=dict)
    histograms: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=dict)
    incidents: Sequence[Incident] = ()
    treatments: Sequence[TreatmentCount] = ()
    first_step: int = 0
    last_step: int = 0
    num_steps: int = 0
    num_skipped: int = 0
    notes: Sequence[str] = ()
    overhead_seconds: float = math.nan
    total_seconds: float = math.nan
    verdict: Verdict | None = None
    folder: str = ""

    @classmethod
    def from_run(cls, run: Run, *, notes: Sequence[str] = (), overhead_seconds: float = math.nan) -> ReportData:
        """Read a run folder, one column after the other."""
        index, steps = run.index, run.steps()
        columns = {}
        for name in run.columns:
            when, values = run.matrix(name)
            columns[name] = table_of(when, values, run.measured(name))
        scalars = {name: run.scalar(name) for name in run.scalars}
        told: list[tuple[int, TreatmentReport]] = []
        histograms = Histograms()
        for record in run.records():
            told += [(record.step, t) for t in record.treatments]
            histograms.add(record)
        treatments, limits = count_treatments(told)
        if limits:
            scalars["clip_limit"] = np.array(list(limits), np.int64), np.array(list(limits.values()))
        times = scalars["time"][1]
        if run.thinned:
            notes = (*notes, "Columns of some early steps were dropped to keep the run folder below its limit.")
        return cls(
            name=_name(run),
            meta=run.meta,
            index=index,
            tables=columns,
            scalars={n: (s.astype(np.float64), v) for n, (s, v) in scalars.items()},
            histograms=histograms.stacked(),
            incidents=tuple(run.incidents),
            treatments=treatments,
            first_step=int(steps[0]) if len(steps) else 0,
            last_step=int(steps[-1]) if len(steps) else 0,
            num_steps=len(steps),
            num_skipped=int(scalars["skipped"][1].sum()),
            notes=tuple(notes),
            overhead_seconds=_overhead(scalars, overhead_seconds),
            total_seconds=float(times[-1] - times[0]) if len(times) > 1 else math.nan,
            verdict=run.verdict(),
            folder=str(run.path),
        )

    @classmethod
    def from_records(
        cls,
        records: Iterable[StepRecord],
        incidents: Sequence[Incident] = (),
        *,
        name: str = "run",
        meta: RunMeta | Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        overhead_seconds: float = math.nan,
    ) -> ReportData:
        """Gather the records still in memory: for a report without a run folder. Paths are those of the last record."""
        kept = list(records)
        index = kept[-1].index if kept else Index.of_parameters(())
        scalars: dict[str, tuple[list[int], list[float]]] = {}
        for record in kept:
            for key, value in (*iter_scalars(record), ("time", record.time)):
                steps, values = scalars.setdefault(key, ([], []))
                steps.append(record.step)
                values.append(value)
        histograms = Histograms()
        for record in kept:
            histograms.add(record)
        treatments, limits = count_treatments((r.step, t) for r in kept for t in r.treatments)
        if limits:
            scalars["clip_limit"] = list(limits), list(limits.values())
        arrays = {n: (np.asarray(s, np.float64), np.asarray(v, np.float64)) for n, (s, v) in scalars.items()}
        if isinstance(meta, RunMeta):
            meta = {k: getattr(meta, k) for k in ("name", "model", "started", "versions", "options", "start_step")}
        return cls(
            name=name,
            meta=meta or {},
            index=index,
            tables=_tables(kept, index),
            scalars=arrays,
            histograms=histograms.stacked(),
            incidents=tuple(incidents),
            treatments=treatments,
            first_step=kept[0].step if kept else 0,
            last_step=kept[-1].step if kept else 0,
            num_steps=len(kept),
            num_skipped=sum(r.skipped for r in kept),
            notes=tuple(notes),
            overhead_seconds=_overhead(arrays, overhead_seconds),
            total_seconds=kept[-1].time - kept[0].time if len(kept) > 1 else math.nan,
        )


def _name(run: Run) -> str:
    """The folder's name; that of the folder above where it is merely called as the callback (`version_3/gradwatch`). A
    log of another program is called by its own."""
    folder, meta = run.path.resolve(), run.meta
    is_callbacks = meta.get("format") == "gradwatch-run" and folder.name == meta.get("name")
    return folder.parent.name if is_callbacks and folder.parent.name else folder.name


def table_of(steps: NDArray[Any], values_TN: Floats, measured_TN: NDArray[np.bool_]) -> Table:
    """Return a pooled table of sizes in float32: finite stays finite, non-zero stays so."""
    matrix = sizes(values_TN, measured_TN)
    pooled_steps, pooled = pool(np.asarray(steps, np.float64), matrix, COLUMNS)
    return Table(pooled_steps, pooled, len(steps), float(steps[-1]) if len(steps) else 0.0)


def count_treatments(
    reports: Iterable[tuple[int, TreatmentReport]],
) -> tuple[tuple[TreatmentCount, ...], dict[int, float]]:
    """Return how often each treatment changed something, and the smallest limit stated at each step, in their order."""
    counts: dict[tuple[str, str], TreatmentCount] = {}
    limits: dict[int, float] = {}
    for step, report in reports:
        limit = report.values.get("limit", math.nan)
        if isinstance(limit, (int, float)) and math.isfinite(limit):
            limits[step] = min(limit, limits.get(step, math.inf))
        if report.applied:
            key = (report.name, report.rule)
            counts.setdefault(key, TreatmentCount(name=report.name, rule=report.rule)).add(
                step, report.before, report.after
            )
    return tuple(counts.values()), dict(sorted(limits.items()))


def _tables(records: Sequence[StepRecord], index: Index) -> dict[str, Table]:
    found: dict[str, Table] = {}
    for name in dict.fromkeys(name for r in records for name in r.columns):
        rows = [r for r in records if name in r.columns and len(r.index) == len(index)]
        if rows:
            values, measured = np.stack([r.columns[name] for r in rows]), np.stack([r.measured(name) for r in rows])
            found[name] = table_of(np.array([r.step for r in rows]), values, measured)
    return found


class Histograms:
    """Exponent histograms of each path, gathered record by record."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[list[int], list[NDArray[np.int64]]]] = {}

    def add(self, record: StepRecord) -> None:
        for path, histogram in record.histograms.items():
            steps, counts = self._found.setdefault(path, ([], []))
            steps.append(record.step)
            counts.append(histogram.counts)

    def stacked(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Return steps (T,) and counts (T, 512) by path."""
        return {p: (np.asarray(s, np.int64), np.stack(c)) for p, (s, c) in self._found.items()}


def _overhead(scalars: Mapping[str, tuple[Any, Floats]], given: float) -> float:
    """Seconds spent: as given, else the sum of the scalar `overhead_seconds` where the engine measured it."""
    if math.isfinite(given) or "overhead_seconds" not in scalars:
        return given
    return float(np.nansum(scalars["overhead_seconds"][1]))
