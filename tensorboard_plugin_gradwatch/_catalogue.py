"""Which series there are, told from their metadata: runs, callbacks within a run, statistics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SCHEMA", "Series", "Source", "catalogue"]

SCHEMA = 1
"""The newest schema this tab can read; the same number as `gradwatch.records.SCHEMA_VERSION`."""


@dataclass(frozen=True)
class Series:
    """One tensor series: where it is, what its metadata say, and how far it has come (`stamp`:
    newest step, newest time)."""

    run: str
    tag: str
    content: Mapping[str, Any]
    stamp: tuple[float, float]


@dataclass
class Source:
    """What one gradwatch callback wrote into one run.

    Attributes:
        id: the run's name, and `@name` for callbacks that are not called `gradwatch`.
        by_kind: `meta`, `index`, `headline`, ...: one series each.
        statistics: name -> window (`last`, `max`) -> series.
        message: why nothing can be shown; "" where it can.
        notes: what was left out, in sentences.
    """

    id: str
    run: str
    name: str
    by_kind: dict[str, Series] = field(default_factory=dict)
    statistics: dict[str, dict[str, Series]] = field(default_factory=dict)
    message: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def stamp(self) -> tuple[float, float]:
        """Newest step and newest time of all series."""
        series = [*self.by_kind.values(), *(s for windows in self.statistics.values() for s in windows.values())]
        return max((s.stamp[0] for s in series), default=0.0), max((s.stamp[1] for s in series), default=0.0)


def catalogue(listing: Mapping[str, Mapping[str, Any]]) -> dict[str, Source]:
    """Return the sources by id, from a data provider's `list_tensors`. Never raises over what the data hold."""
    sources: dict[str, Source] = {}
    for run, tags in sorted(listing.items()):
        for tag, listed in tags.items():
            content = _content(listed.plugin_content)
            name = str(content.get("name") or tag.partition("/")[0])
            key = run if name == "gradwatch" else f"{run}@{name}"
            source = sources.setdefault(key, Source(key, run, name))
            _add(source, Series(run, tag, content, (float(listed.max_step), float(listed.max_wall_time))))
    for source in sources.values():
        if not source.message and "index" not in source.by_kind:
            source.message = (
                f"{source.id} has no list of paths ({source.name}/_index), so its rows have no names: the event file "
                "was cut short before the first record was written, or another program wrote it."
            )
    return sources


def _add(source: Source, series: Series) -> None:
    kind, schema = series.content.get("kind"), series.content.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        source.message = (
            f"{source.id} was written in schema {schema}; this tab reads up to {SCHEMA}. "
            "Update gradwatch where TensorBoard runs: pip install -U gradwatch."
        )
    elif not isinstance(kind, str):
        source.notes.append(f"Left out {series.tag}: it does not say what it is (damaged metadata, or a very old log).")
    elif kind == "statistic":
        windows = source.statistics.setdefault(str(series.content.get("statistic")), {})
        windows["max" if series.content.get("window") == "max" else "last"] = series
    else:
        source.by_kind[kind] = series


def _content(raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except (ValueError, TypeError):
        return {}
    return content if isinstance(content, dict) else {}
