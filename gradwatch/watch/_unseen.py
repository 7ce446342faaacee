"""What gradwatch could not see: said, never shown as zero."""

from __future__ import annotations

from collections.abc import Sequence

from ._judge import Judge
from ._meter import Meter

__all__ = ["unseen"]


def unseen(meter: Meter, judge: Judge) -> list[str]:
    """Return what could not be watched or judged, in sentences."""
    notes = []
    if meter.watched.missing:
        notes.append(f"trainable, but in no optimizer: {_listed(meter.watched.missing)}")
    if meter.too_large:
        notes.append(f"updates not measured, larger than the memory limit: {_listed(meter.too_large)}")
    if meter.local is not None and meter.local.num_sharded:
        notes.append(f"local norms leave out {meter.local.num_sharded} sharded parameters: FSDP reduces first")
    if meter.local is not None and meter.local.failure:
        notes.append(f"local norms were switched off: {meter.local.failure}")
    reasons: dict[str, list[str]] = {}
    if meter.tap is not None:
        for path, reason in meter.tap.coverage().items():
            reasons.setdefault(reason, []).append(path)
    notes += [f"{_listed(paths)}: {reason}" for reason, paths in reasons.items() if reason]
    idle = sorted({c.name for c in judge.coverage if not c.judged and c.reason})
    if idle:
        notes.append(f"rules that had nothing to judge: {', '.join(idle)}")
    return notes


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
