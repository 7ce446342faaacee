"""A run as its event files hold it: at the steps that were logged, with the largest value since the one before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gradwatch.records import Verdict

from ._catalogue import Series, Source
from ._reader import Point, read_headline, read_index, read_json, read_scalars, read_statistic
from ._ridge import HistogramRow, exponent_row
from ._shown import Table
from ._verdict import in_order, verdict_of

__all__ = ["EventRun", "about_of", "place_of"]


class EventRun:
    """What a source holds.

    Args:
        source: where the series are.
        read: returns the points of one, in order, without those that a resumed run wrote anew.
    """

    def __init__(self, source: Source, read: Callable[[Series], list[Point]]) -> None:
        self._source, self._read = source, read
        self.id, self.message = source.id, source.message

    @property
    def last_time(self) -> float:
        return self._source.stamp[1]

    def stamp(self, *parts: str) -> tuple[Any, ...]:
        source = self._source
        if parts[0] == "matrix":
            windows = source.statistics.get(parts[1], {})
            return tuple(s.stamp for s in [*windows.values(), *filter(None, [source.by_kind.get("index")])])
        series = source.by_kind.get(parts[0])
        return series.stamp if series is not None else ()

    def about(self) -> dict[str, Any]:
        source = self._source
        statistics = {n: about_of(next(iter(w.values())).content) for n, w in source.statistics.items()}
        return {
            "id": source.id,
            "index": read_index(self._read, source)[-1][1],
            "statistics": statistics,
            "meta": self.meta(),
            "has_histograms": "histograms" in source.by_kind,
            "stamp": source.stamp,
            "notes": source.notes,
        }

    def meta(self) -> Mapping[str, Any]:
        """Return what the run said of itself as it began; nothing where that is damaged."""
        told = [m for _, m in read_json(self._read, self._source.by_kind.get("meta")) if isinstance(m, dict)]
        return told[-1] if told else {}

    def statistic(self, name: str) -> Table:
        return read_statistic(self._read, self._source, name)

    def headline(self) -> Table:
        return read_headline(self._read, self._source)

    def scalars(self) -> Table:
        return read_scalars(self._read, self._source)

    def incidents(self) -> tuple[Sequence[Mapping[str, Any]], Verdict]:
        source, read = self._source, self._read
        newest: dict[tuple[Any, ...], dict[str, Any]] = {}
        for _, incident in read_json(read, source.by_kind.get("incidents")):
            if isinstance(incident, dict) and "rule" in incident:
                key = (incident.get("id"), incident.get("name") or incident["rule"], incident.get("first_step"))
                newest[key] = incident
        found = list(newest.values())
        verdict = verdict_of(found, read_json(read, source.by_kind.get("judged")), source, read_headline(read, source))
        return in_order(sorted(found, key=place_of)), verdict

    def histograms(self, path: str) -> Sequence[HistogramRow]:
        series, indexes = self._source.by_kind.get("histograms"), read_index(self._read, self._source)
        rows: list[HistogramRow] = []
        for point in self._read(series) if series is not None else ():
            index = [index for step, index in indexes if step <= point.step] or [indexes[0][1]]
            if path not in index[-1]["paths"] or np.ndim(point.value) != 2 or point.value.shape[1] < 6:
                continue
            place = index[-1]["paths"].index(path)
            for row in point.value[point.value[:, 0] == place]:
                first, counts = exponent_row(float(row[3]), float(row[4]), row[5:])
                rows.append((point.step, float(row[1]), float(row[2]), first, counts))
        return rows


def about_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a series runs over, and what its run says of it where it is the user's own."""
    about = content.get("about")
    found = {"over": str(content.get("over", "parameter"))}
    return {**found, "about": about} if isinstance(about, dict) else found


def place_of(incident: Mapping[str, Any]) -> tuple[float, float]:
    """Where an incident stands in order; what is no number comes first."""
    step, number = (incident.get(k) for k in ("first_step", "id"))
    return tuple(float(v) if isinstance(v, (int, float)) else 0.0 for v in (step, number))  # type: ignore[return-value]
