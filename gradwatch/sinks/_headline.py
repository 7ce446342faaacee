"""The few numbers of a logging window that every logger gets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..records import Floats, Incident, StepRecord
from ._incident_lines import IncidentKey, incident_key

__all__ = ["FIELDS", "SCALARS", "Headline", "newest", "whole_window"]

SCALARS = (
    "global_norm",
    "global_norm_after",
    "global_norm_max",
    "largest_layer",
    "smallest_layer",
    "update_ratio_median",
    "update_ratio_max",
    "clipped_share",
    "num_skipped",
    "num_incidents",
    "loss",
    "limit",
)
"""What scalar loggers get: at most these 12, whatever the model."""

FIELDS = (
    "global_norm",
    "global_norm_after",
    "global_norm_max",
    "global_norm_min",
    "loss",
    "loss_max",
    "lr",
    "limit",
    "num_skipped",
    "num_treated",
    "clipped_share",
    "window",
    "num_seen",
    "global_norm_applied",
)
"""What the headline tensor holds."""


def whole_window(record: StepRecord, window: Sequence[StepRecord]) -> list[StepRecord]:
    """Return the window's records, `record` last, whether or not the window names it."""
    return [*(r for r in window if r is not record), record]


def newest(window: Sequence[StepRecord], column: str) -> StepRecord | None:
    """Return the newest record of the window in which the column was measured."""
    return next((r for r in reversed(window) if column in r.columns), None)


def weights(record: StepRecord, column: str) -> Floats:
    """Return the column's measurements over weights (two dimensions or more); over all parameters if there are none."""
    parameters = record.measured(column) & record.index.is_parameter
    chosen = parameters & (record.index.ndim >= 2)
    return record.columns[column][chosen if chosen.any() else parameters]


class Headline:
    """Reduces windows of records to the headline, and counts what is counted from the start of the run.

    Attributes:
        count: records seen.
        num_skipped: steps at which the optimizer was kept from moving anything.
        num_treated: steps at which a treatment changed something.
    """

    def __init__(self) -> None:
        self.count = 0
        self.num_skipped = 0
        self.num_treated = 0
        self._incidents: set[IncidentKey] = set()

    def incident(self, incident: Incident) -> None:
        self._incidents.add(incident_key(incident))

    def update(self, window: Sequence[StepRecord]) -> dict[str, float]:
        """Return what is known of the window, newest record last. What was not measured is absent; nan is nan."""
        last = window[-1]
        self.count += len(window)
        values = {"lr": last.lr, "window": float(len(window))}
        seen = [r for r in window if r.has_gradient]
        values["num_seen"] = float(len(seen))
        if seen:
            norms = np.array([r.global_norm for r in seen])
            values |= {
                "global_norm": seen[-1].global_norm,
                "global_norm_after": seen[-1].global_norm_after,
                # nan goes through: the maximum of a window with a nan in it is nan.
                "global_norm_max": float(np.max(norms)),
                "global_norm_min": float(np.min(norms)),
            }
            applied = seen[-1].global_norm_applied
            values |= {} if applied is None else {"global_norm_applied": applied}
        losses = [r.loss for r in window if r.has_loss]
        if losses:
            values |= {"loss": losses[-1], "loss_max": float(np.max(losses))}
        values |= self._treated(window) | _layers(window)
        limit = _limit(last)
        if limit is not None:
            values["limit"] = limit
        return values | {"num_incidents": float(len(self._incidents))}

    def _treated(self, window: Sequence[StepRecord]) -> dict[str, float]:
        self.num_skipped += sum(r.skipped for r in window)
        applied = [any(t.applied for t in r.treatments) for r in window]
        self.num_treated += sum(applied)
        counts = {"num_skipped": float(self.num_skipped), "num_treated": float(self.num_treated)}
        if not any(r.treatments for r in window):
            return counts
        clipped = sum(a and not r.skipped for a, r in zip(applied, window, strict=True))
        return counts | {"clipped_share": clipped / len(window)}


def _layers(window: Sequence[StepRecord]) -> dict[str, float]:
    values: dict[str, float] = {}
    if (record := newest(window, "grad_norm")) and len(norms := weights(record, "grad_norm")):
        values |= {"largest_layer": float(np.max(norms)), "smallest_layer": float(np.min(norms))}
    if (record := newest(window, "update_ratio")) and len(ratios := weights(record, "update_ratio")):
        values |= {"update_ratio_median": float(np.median(ratios)), "update_ratio_max": float(np.max(ratios))}
    return values


def _limit(record: StepRecord) -> float | None:
    """Return the smallest limit for the global norm that a treatment or a rule stated at this step."""
    stated = [t.values[k] for t in record.treatments for k in ("limit", "max_norm") if k in t.values]
    stated += [v for k, v in record.scalars.items() if k == "limit" or k.startswith("limit/")]
    finite = [float(v) for v in stated if np.isfinite(v)]
    return min(finite) if finite else None
