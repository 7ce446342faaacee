"""An incident while it is going on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..records import Incident, StepRecord
from ._findings import Findings
from ._rule import Rule

__all__ = ["Case"]


@dataclass
class Case:
    """What is known of an incident so far; `incident()` gives it frozen."""

    id: int
    rule: Rule
    first_step: int
    last_step: int
    first_path: str = ""
    paths: list[str] = field(default_factory=list)
    value: float = float("nan")
    limit: float = float("nan")
    message: str = ""
    worst_path: str | None = None
    worst_step: int | None = None
    treatments: list[str] = field(default_factory=list)
    count: int = 0
    resolved_step: int | None = None
    details: dict[str, Any] = field(default_factory=dict)
    member: Any = None
    """bool (n,): paths that are in `paths`; None: to be made again."""

    def add(self, record: StepRecord, findings: Findings) -> None:
        """Take in the findings of one step."""
        index = record.index
        positions = findings.positions[findings.positions < len(index)]
        if not self.count:
            self.first_path = self.rule.first_path(record, findings.positions)
        if self.member is None or len(self.member) != len(index):
            known = set(self.paths)
            self.member = np.fromiter((p in known for p in index.paths), np.bool_, len(index))
        fresh = positions[~self.member[positions]]
        if len(fresh):
            backward = self.rule.order == "backward"
            order = np.lexsort((fresh, index.depth[fresh]))
            self.paths.extend(map(index.paths.__getitem__, fresh[order[::-1] if backward else order].tolist()))
            self.member[fresh] = True
        self._remember_worst(findings, record)
        self.count += 1
        self.last_step = record.step

    def _remember_worst(self, findings: Findings, record: StepRecord) -> None:
        low = self.rule.low_is_worse
        i = findings.worst(low)
        value = float(findings.values[i])
        finite = bool(np.isfinite(self.value))
        no_worse = value >= self.value if low else value <= self.value
        better_known = finite and bool(np.isfinite(value)) and no_worse
        if self.count and (better_known or not finite):
            return
        self.value, self.limit, self.message = value, float(findings.limits[i]), findings.message(i)
        self.worst_step = record.step
        position, paths = int(findings.positions[i]), record.index.paths
        self.worst_path = paths[position] if position < len(paths) else ""

    def incident(self) -> Incident:
        """Return it as it stands."""
        rule = self.rule
        return Incident(
            rule=rule.rule_name,
            name=rule.name,
            severity=rule.severity,
            first_step=self.first_step,
            last_step=self.last_step,
            paths=tuple(self.paths),
            first_path=self.first_path,
            value=self.value,
            limit=self.limit,
            treatments=tuple(self.treatments),
            advice=rule.advice,
            message=self.message,
            worst_path=self.worst_path,
            worst_step=self.worst_step,
            resolved=self.resolved_step is not None,
            resolved_step=self.resolved_step,
            count=self.count,
            id=self.id,
            labels=dict(rule.labels or {}),
            details=dict(self.details),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        names = (
            *("id", "first_step", "last_step", "first_path", "value", "limit", "message", "count"),
            *("worst_path", "worst_step"),
        )
        lists = {"paths": list(self.paths), "treatments": list(self.treatments), "details": dict(self.details)}
        return {**{n: getattr(self, n) for n in (*names, "resolved_step")}, **lists}

    @classmethod
    def from_state(cls, rule: Rule, state: Mapping[str, Any]) -> Case:
        """Return the case of a `state_dict`."""
        values: dict[str, Any] = {k: list(v) if isinstance(v, list) else v for k, v in state.items()}
        return cls(rule=rule, **values)
