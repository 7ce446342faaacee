"""From a profile's records to numbers, a table and a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..errors import UnknownNameError
from ._profile_records import Clock, Record

__all__ = ["ModuleProfile", "chrome_trace", "summarise", "table"]

Span = tuple[float, float]
Marks = Mapping[int, Sequence[tuple[str, float]]]
"""Moments at which parameters got their gradients, by backward."""


@dataclass(frozen=True, kw_only=True)
class ModuleProfile:
    """What one module took, summed over its calls. Times in milliseconds.

    Attributes:
        path: of the module.
        type: its class.
        depth: how deep its call is nested.
        calls: forward calls, recomputation not counted.
        forward_ms: with its children.
        forward_self_ms: without them.
        backward_ms: with its children; 0 where no backward ran.
        recompute_ms: forward passes run again by checkpointing.
        activation_mb: MiB of the outputs it made (outputs that share memory with its inputs do not count).
        memory_mb: MiB by which the device's allocated memory grew during its forward; 0 on the CPU.
    """

    path: str
    type: str
    depth: int
    calls: int
    forward_ms: float
    forward_self_ms: float
    backward_ms: float
    recompute_ms: float
    activation_mb: float
    memory_mb: float


def _forward(record: Record, clock: Clock) -> Span | None:
    if record.forward_end is None:
        return None
    return clock.microseconds(record.forward_start), clock.microseconds(record.forward_end)


def _backward(record: Record, marks: Marks, clock: Clock) -> Span | None:
    """Return begin and end of a call's backward, as far as it was seen."""
    if record.backward_start is None:
        return None
    start = clock.microseconds(record.backward_start)
    if record.backward_end is not None:
        return start, max(start, clock.microseconds(record.backward_end))
    inside = f"{record.path}." if record.path else ""
    ends = [m for path, m in marks.get(record.backward_task, ()) if m >= start and path.startswith(inside)]
    return (start, max(ends)) if ends else (start, start)


def _marks(times: Sequence[tuple[str, Any, int]], clock: Clock) -> Marks:
    found: dict[int, list[tuple[str, float]]] = {}
    for path, moment, task in times:
        found.setdefault(task, []).append((path, clock.microseconds(moment)))
    return found


def summarise(
    records: Sequence[Record],
    parameter_times: Sequence[tuple[str, Any, int]],
    types: Mapping[str, str],
    order: Mapping[str, int],
    clock: Clock,
) -> list[ModuleProfile]:
    """Return one entry for each module that ran, in model order."""
    marks = _marks(parameter_times, clock)
    sums: dict[str, dict[str, float]] = {}
    depth: dict[str, int] = {}
    for record in records:
        span = _forward(record, clock)
        if span is None:
            continue
        took = (span[1] - span[0]) / 1e3
        s = sums.setdefault(record.path, dict.fromkeys(_SUMMED, 0.0))
        depth.setdefault(record.path, record.depth)
        if record.is_recompute:
            s["recompute_ms"] += took
        else:
            s["calls"] += 1
            s["forward_ms"] += took
            s["forward_self_ms"] += took
            s["activation_mb"] += record.activation_bytes / 2**20
            s["memory_mb"] += (record.memory_after - record.memory_before) / 2**20
            if record.parent is not None and not record.parent.is_recompute:
                parent = sums.setdefault(record.parent.path, dict.fromkeys(_SUMMED, 0.0))
                parent["forward_self_ms"] -= took
        if (back := _backward(record, marks, clock)) is not None:
            s["backward_ms"] += (back[1] - back[0]) / 1e3
    ran = [path for path in sorted(sums, key=lambda p: order.get(p, 0)) if path in depth]
    return [_entry(path, types[path], depth[path], sums[path]) for path in ran]


def _entry(path: str, kind: str, depth: int, sums: dict[str, float]) -> ModuleProfile:
    values: dict[str, Any] = {**sums, "calls": int(sums["calls"])}
    return ModuleProfile(path=path, type=kind, depth=depth, **values)


_SUMMED = [f.name for f in fields(ModuleProfile) if f.name not in ("path", "type", "depth")]


def table(modules: Sequence[ModuleProfile], *, sort: str | None, top: int | None) -> str:
    """Return the entries as text."""
    if sort is not None:
        if sort not in _SUMMED:
            raise UnknownNameError("column", sort, _SUMMED)
        modules = sorted(modules, key=lambda m: -getattr(m, sort))
    names = [f"{'  ' * m.depth if sort is None else ''}{m.path or '(model)'}" for m in modules]
    width = max([len(name) for name in names] + [6])
    kind = max([len(m.type) for m in modules] + [4])
    head = f"{'module':{width}}  {'type':{kind}}  calls  forward ms  (self)  backward ms  recompute ms  activations MiB"
    lines = [head]
    for name, m in list(zip(names, modules, strict=True))[:top]:
        lines.append(
            f"{name:{width}}  {m.type:{kind}}  {m.calls:5d}  {m.forward_ms:10.3f}  {m.forward_self_ms:6.3f}  "
            f"{m.backward_ms:11.3f}  {m.recompute_ms:12.3f}  {m.activation_mb:15.3f}"
        )
    return "\n".join(lines)


def chrome_trace(
    records: Sequence[Record], parameter_times: Sequence[tuple[str, Any, int]], types: Mapping[str, str], clock: Clock
) -> dict[str, Any]:
    """Return complete events, forward and backward as two threads of one process."""
    marks = _marks(parameter_times, clock)
    events: list[dict[str, Any]] = []

    def add(record: Record, span: Span | None, phase: str) -> None:
        if span is None:
            return
        events.append(
            {
                "name": record.path or "(model)",
                "cat": "recompute" if record.is_recompute and phase == "forward" else phase,
                "ph": "X",
                "ts": span[0],
                "dur": span[1] - span[0],
                "pid": 0,
                "tid": phase,
                "args": {"type": types[record.path], "activation_bytes": record.activation_bytes},
            }
        )

    for record in records:
        add(record, _forward(record, clock), "forward")
        add(record, _backward(record, marks, clock), "backward")
    return {"traceEvents": events, "displayTimeUnit": "ms"}
