"""What a run left behind, in plain values, and how two such stories differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradwatch import Incident, StepRecord
from gradwatch.records import TreatmentReport

__all__ = ["Allowed", "Story", "differences"]

_TIMED = frozenset({"seconds", "overhead_seconds"})
"""Scalars that no two runs share."""


@dataclass
class Story:
    """What a run left behind.

    Attributes:
        incidents: as they stood at the end, their treatments included.
        records: of every step.
        requests: (kind, step at which it was carried out), of actions that reach the user's code.
        end: how the run ended: "" or what was raised.
        skipped, overflows: steps, by the counters.
        weights: parameters and buffers at the end.
        said: anything else that a scenario has to say.
    """

    incidents: list[Incident] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)
    requests: list[tuple[str, int]] = field(default_factory=list)
    end: str = ""
    skipped: int = 0
    overflows: int = 0
    weights: list[Any] = field(default_factory=list)
    said: dict[str, Any] = field(default_factory=dict)

    @property
    def rules(self) -> list[tuple[str, int]]:
        """Rules of the incidents, with their first steps."""
        return [(i.rule, i.first_step) for i in self.incidents]

    def record(self, step: int) -> StepRecord:
        """Return the record of one step."""
        return next(r for r in self.records if r.step == step)


@dataclass(frozen=True)
class Allowed:
    """By what a late place may differ from the CPU: what is documented to lag, and nothing else.

    Attributes:
        rtol: of all numbers; sums on a device are in another order than on the CPU.
        limits: a rule's limit, and what is clipped to it, follow the norms that have arrived: this much of them may
            differ (a share).
        actions: what actions ask for is carried out up to `lag + 1` steps later; what training does from there on is
            not compared.
        closely: modules are looked at closely from up to `lag + 1` steps later on.
    """

    rtol: float = 1e-4
    limits: float = 0.0
    actions: bool = False
    closely: bool = False


def differences(cpu: Story, late: Story, allowed: Allowed, lag: int) -> list[str]:
    """Return one line for each thing that differs by more than is allowed."""
    return list(_differences(cpu, late, allowed, lag))


def _differences(cpu: Story, late: Story, allowed: Allowed, lag: int) -> Iterator[str]:
    yield from _plain("end", cpu.end, late.end, allowed.rtol)
    until = min([step for _, step in cpu.requests], default=len(cpu.records)) if allowed.actions else math.inf
    yield from _requests(cpu.requests, late.requests, lag if allowed.actions else 0)
    if not allowed.actions:
        yield from _plain("number of records", len(cpu.records), len(late.records), 0)
        yield from _plain("skipped", cpu.skipped, late.skipped, 0)
        yield from _plain("overflows", cpu.overflows, late.overflows, 0)
        yield from _plain("weights", cpu.weights, late.weights, max(allowed.rtol, allowed.limits))
    yield from _plain("number of incidents", cpu.rules, late.rules, 0)
    for one, other in zip(cpu.incidents, late.incidents, strict=False):
        yield from _plain(f"incident {one.rule}", _incident(one, allowed), _incident(other, allowed), allowed.rtol)
    for one, other in zip(cpu.records, late.records, strict=False):
        if one.step <= until:
            yield from _record(f"step {one.step}", one, other, allowed)
    yield from _plain("said", cpu.said, late.said, max(allowed.rtol, allowed.limits))


def _requests(cpu: Sequence[tuple[str, int]], late: Sequence[tuple[str, int]], lag: int) -> Iterator[str]:
    yield from _plain("requests", sorted(k for k, _ in cpu), sorted(k for k, _ in late), 0)
    for (kind, step), (_, later) in zip(sorted(cpu), sorted(late), strict=False):
        if not step <= later <= step + lag + 1:
            yield f"request {kind}: carried out at step {step} on the CPU, at step {later} late"


def _incident(incident: Incident, allowed: Allowed) -> dict[str, Any]:
    names = ["severity", "paths", "first_path", "first_step", "value", "treatments", "details"]
    if not allowed.actions:
        names += ["last_step", "count", "resolved"]
    if not allowed.limits:
        names += ["limit", "message"]
    return {name: getattr(incident, name) for name in names}


def _record(where: str, one: StepRecord, other: StepRecord, allowed: Allowed) -> Iterator[str]:
    plain = ["step", "loss", "has_loss", "lr", "num_samples", "global_norm", "skipped"]
    yield from _plain(where, *({n: getattr(r, n) for n in plain} for r in (one, other)), allowed.rtol)
    for kind in ("columns", "masks"):
        yield from _plain(
            f"{where} {kind}", *_both([dict(getattr(r, kind)) for r in (one, other)], allowed), allowed.rtol
        )
    yield from _plain(where, *({p: h.counts for p, h in r.histograms.items()} for r in (one, other)), 0)
    left_out = _TIMED | {"global_norm_applied"} | ({"limit"} if allowed.limits else set())
    scalars = [{n: v for n, v in r.scalars.items() if n not in left_out} for r in (one, other)]
    yield from _plain(f"{where} scalars", *_both(scalars, allowed), allowed.rtol)
    rtol = max(allowed.rtol, allowed.limits)
    yield from _plain(f"{where} after", one.global_norm_after, other.global_norm_after, rtol)
    yield from _plain(f"{where} applied", one.global_norm_applied, other.global_norm_applied, rtol)
    done = [[_report(t) for t in r.treatments if t.applied or not t.rule] for r in (one, other)]
    yield from _plain(f"{where} treatments", *done, rtol)


def _both(pair: list[dict[str, Any]], allowed: Allowed) -> list[dict[str, Any]]:
    """Return the entries to be compared: those that both have, where one of them may have looked more closely."""
    names = pair[0].keys() & pair[1].keys() if allowed.closely else pair[0].keys() | pair[1].keys()
    return [{name: value for name, value in one.items() if name in names} for one in pair]


def _report(report: TreatmentReport) -> tuple[object, ...]:
    # A treatment behind a rule that did not fire is left out: on a device it looks on at every step, and decides there.
    return report.name, report.rule, report.applied, report.before, report.after, dict(report.values)


def _plain(where: str, one: Any, other: Any, rtol: float) -> Iterator[str]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if set(one) != set(other):
            yield f"{where}: {sorted(set(one) - set(other))} on the CPU only, {sorted(set(other) - set(one))} late only"
        for key in one.keys() & other.keys():
            yield from _plain(f"{where} {key}", one[key], other[key], rtol)
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            yield f"{where}: {one} on the CPU, {other} late"
            return
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _plain(f"{where}[{i}]", a, b, rtol)
    elif not _same(one, other, rtol):
        yield f"{where}: {one!r} on the CPU, {other!r} late"


def _same(one: Any, other: Any, rtol: float) -> bool:
    if isinstance(one, (int, float, np.ndarray)) and isinstance(other, (int, float, np.ndarray)):
        a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
        # What rounding leaves of a zero differs between any two orders of summing.
        return a.shape == b.shape and np.allclose(a, b, rtol=rtol, atol=1e-6 * rtol + 1e-9, equal_nan=True)
    return one == other
