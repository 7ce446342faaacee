"""The plugin tensors of one log step; their format is described in docs/formats.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...protocols import RunMeta
from ...records import SCHEMA_VERSION, Bools, Buckets, Floats, Incident, Index, StepRecord, column_of, own_columns
from .._headline import FIELDS, newest
from .._plain import dumps, plain
from ._values import encode_missing, strings, tensor

__all__ = ["BUCKETS", "PluginTensors"]

BUCKETS = 40
MAX_PATHS = 256


class PluginTensors:
    """Makes the values, and remembers which series have begun: the first event of each carries its metadata."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._begun: set[str] = set()
        self._over: dict[str, str] = {}
        self._index: Index | None = None

    @property
    def is_new(self) -> bool:
        """Nothing has been made yet."""
        return not self._begun

    def _content(self, tag: str, kind: str, **more: Any) -> dict[str, Any] | None:
        if tag in self._begun:
            return None
        self._begun.add(tag)
        return {"schema": SCHEMA_VERSION, "kind": kind, "name": self.name, **more}

    def _json(self, kind: str, data: Any) -> Any:
        tag = f"{self.name}/_{kind}"
        return strings(tag, dumps(data), self._content(tag, kind))

    def meta(self, meta: RunMeta) -> Any:
        fields = ("name", "model", "started", "start_step", "versions", "options")
        # Where there is a run folder, the tab reads that: it holds every step.
        folder = "" if meta.run_dir is None else str(Path(meta.run_dir).resolve())
        told = {"schema": SCHEMA_VERSION, "run_dir": folder}
        return self._json("meta", told | {f: getattr(meta, f) for f in fields})

    def index(self, index: Index) -> Any | None:
        """Return the index, or None where it is the one written last."""
        if index is self._index:
            return None
        before, self._index = self._index, index
        if before is not None and before.to_json() == index.to_json():
            return None
        return self._json("index", index.to_json())

    def headline(self, values: dict[str, float]) -> Any:
        tag = f"{self.name}/_headline"
        array = np.array([values.get(f, np.nan) for f in FIELDS])
        return tensor(tag, array, self._content(tag, "headline", fields=list(FIELDS)))

    def scalars(self, window: Sequence[StepRecord]) -> list[Any]:
        merged = {k: v for r in window for k, v in r.scalars.items()}
        return [self._json("scalars", merged)] if merged else []

    def treatments(self, window: Sequence[StepRecord]) -> list[Any]:
        record = next((r for r in reversed(window) if any(t.applied for t in r.treatments)), None)
        if record is None:
            return []
        fields = ("name", "rule", "before", "after", "applied", "values")
        reports = [{"step": record.step, **{f: getattr(t, f) for f in fields}} for t in record.treatments]
        return [self._json("treatments", reports)]

    def incidents(self, incidents: Sequence[Incident]) -> Any:
        tag = f"{self.name}/_incidents"
        return strings(tag, [dumps(_short(i)) for i in incidents], self._content(tag, "incidents"))

    def judged(self, told: dict[str, Any]) -> Any:
        return self._json("judged", told)

    def statistics(self, window: Sequence[StepRecord]) -> list[Any]:
        """Return the newest measurement of every column, and the largest where there were several."""
        index = window[-1].index
        window = [r for r in window if r.index is index]
        values = []
        for column in dict.fromkeys(c for r in window for c in r.columns):
            values += self._statistic(column, [r for r in window if column in r.columns])
        return values

    def _statistic(self, column: str, records: Sequence[StepRecord]) -> list[Any]:
        last = newest(records, column)
        assert last is not None
        rows = self._rows(column, last)
        if rows is None:
            return []
        values = [self._column(column, "last", encode_missing(last.columns[column], last.measured(column))[rows])]
        known = column_of(column)
        if len(records) > 1 and not (known and known.signed):
            measured = np.array([r.measured(column) for r in records])
            largest = _largest(np.array([r.columns[column] for r in records]), measured)
            values.append(self._column(column, "max", encode_missing(largest, np.asarray(measured.any(axis=0)))[rows]))
        return values

    def _column(self, column: str, window: str, array: Any) -> Any:
        tag = f"{self.name}/{column}" + ("_max" if window == "max" else "")
        over = self._over[column]
        more: dict[str, Any] = {"statistic": column, "over": over, "window": window}
        own = next((c for c in own_columns() if c.name == column), None)
        if own is not None:
            more["about"] = own.to_json()
        return tensor(tag, array, self._content(tag, "statistic", **more))

    def _rows(self, column: str, record: StepRecord) -> Bools | None:
        """Return which paths the series runs over: fixed when it begins; None where nothing was ever measured."""
        index, measured = record.index, record.measured(column)
        if column not in self._over:
            parameters, modules = (measured & index.is_parameter).any(), (measured & index.is_module).any()
            if not parameters and not modules:
                return None
            self._over[column] = "all" if parameters and modules else "parameter" if parameters else "module"
        kinds = {"parameter": index.is_parameter, "module": index.is_module}
        return kinds.get(self._over[column], np.ones(len(index), np.bool_))

    def histograms(self, record: StepRecord, buckets: Buckets) -> Any:
        """Return all histograms of a record as one tensor, given their log10 buckets."""
        tag, places = f"{self.name}/_histograms", record.index.positions
        known = np.array([path in places for path in record.histograms], np.bool_)
        array = np.zeros((int(known.sum()), 5 + BUCKETS), np.float32)
        array[:, 0] = [places[path] for path in record.histograms if path in places]
        array[:, 1:3] = buckets.rest[known]
        begin, second = buckets.edges[known, 0], buckets.edges[known, 1]
        array[:, 3:5] = np.where(buckets.lengths[known, None] > 0, np.stack([begin, second - begin], axis=1), 0.0)
        array[:, 5:] = buckets.counts[known]
        return tensor(tag, array, self._content(tag, "histograms", buckets=BUCKETS))


def _largest(values: Floats, measured: Bools) -> Floats:
    """Return the maximum over records (axis 0) of what was measured; nan is the largest of all."""
    return np.max(np.where(measured, values, -np.inf), axis=0)


def _short(incident: Incident) -> dict[str, Any]:
    data = {**incident.to_json(), "treatments": list(incident.done)}
    return plain({**data, "paths": data["paths"][:MAX_PATHS], "num_paths": len(incident.paths)})
