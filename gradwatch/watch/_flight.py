"""The flight recorder: what the last steps looked like, written beside an incident."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._text import file_name
from ..records import Incident, StepRecord, iter_scalars
from ..sinks._files import replace_whole

__all__ = ["NUM_RECORDS", "write_flight"]

NUM_RECORDS = 256


def write_flight(
    folder: Path, incident: Incident, history: Sequence[StepRecord], modules: Sequence[dict[str, Any]] = ()
) -> Path:
    """Write `flight-<step>-<name>.json`: the scalars of the last records, the last record's columns, and the module
    table of the autopsy where there was one. Non-finite numbers are the strings "nan", "inf" and "-inf".

    Args:
        folder: the run folder.
        incident: that it is written for.
        history: records, oldest first.
        modules: rows of the module table.
    """
    recent = list(history)[-NUM_RECORDS:]
    names = sorted({name for record in recent for name, _ in iter_scalars(record)})
    series = {name: [dict(iter_scalars(r)).get(name, math.nan) for r in recent] for name in names}
    last = recent[-1] if recent else None
    content = {
        "incident": incident.to_json(),
        "steps": [r.step for r in recent],
        "scalars": {name: [_plain(v) for v in values] for name, values in series.items()},
        "paths": [] if last is None else list(last.index.paths),
        "columns": {} if last is None else {k: _column(last, k) for k in last.columns},
        "modules": [{k: _plain(v) for k, v in row.items()} for row in modules],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"flight-{incident.first_step:06d}-{file_name(incident.name or incident.rule)}.json"
    replace_whole(path, json.dumps(content).encode())
    return path


def _column(record: StepRecord, name: str) -> list[Any]:
    measured = record.measured(name)
    return [_plain(float(v)) if m else None for v, m in zip(record.columns[name], measured, strict=True)]


def _plain(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else str(float(value))
    return value
