"""A report as JSON, for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..records import SCHEMA_VERSION
from ._data import ReportData
from ._layers import layer_rows
from ._summary import summarise

__all__ = ["to_json"]


def to_json(data: ReportData) -> str:
    """Return the summary, every incident, the treatments and the layers. Non-finite numbers are strings."""
    summary = summarise(data)
    report = {
        "format": "gradwatch-report",
        "schema": SCHEMA_VERSION,
        "name": data.name,
        "state": summary.state,
        "headline": summary.headline,
        "verdict": summary.verdict.to_json(),
        "facts": summary.facts,
        "stories": [
            {
                **{
                    k: getattr(s, k)
                    for k in ("rule", "name", "severity", "title", "meaning", "place", "part", "advice", "treated")
                },
                "incidents": [i.id for i in s.incidents],
            }
            for s in summary.stories
        ],
        "incidents": [
            i.to_json() if i.case is None else {**i.to_json(), "case": i.case.to_json()} for i in data.incidents
        ],
        "treatments": [asdict(t) for t in data.treatments],
        "steps": {
            "first": data.first_step,
            "last": data.last_step,
            "recorded": data.num_steps,
            "skipped": data.num_skipped,
        },
        "seconds": {"gradwatch": data.overhead_seconds, "run": data.total_seconds},
        "layers": [asdict(r) for r in layer_rows(data)],
        "notes": summary.notes,
        "meta": dict(data.meta),
    }
    return json.dumps(_plain(report), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
