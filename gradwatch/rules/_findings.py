"""What one rule saw in one record, kept as arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ..records import Bools, Finding, Floats, StepRecord

if TYPE_CHECKING:
    from ._rule import Rule

__all__ = ["Findings", "format_findings"]


class Findings(Sequence[Finding]):
    """Findings of one rule at one step; each `Finding` is made when it is asked for.

    Attributes:
        positions: places in the index where the condition holds; `len(index)` stands for the whole model.
        values, limits: one per position.
        judged: which paths were judged (n,), or True for all and the whole model, or False for none.
        reason: why nothing was judged.
        text: of the message, a format string over `value` and `limit`.
    """

    __slots__ = ("_record", "_rule", "judged", "limits", "positions", "reason", "text", "values")

    def __init__(
        self,
        rule: Rule,
        record: StepRecord,
        positions: Any,
        values: Floats,
        limits: Floats,
        *,
        judged: Bools | bool = True,
        reason: str = "",
        text: str = "",
    ) -> None:
        self._rule = rule
        self._record = record
        self.positions = positions
        self.values = values
        self.limits = limits
        self.judged = judged
        self.reason = reason
        self.text = text

    @classmethod
    def of(cls, rule: Any, record: StepRecord, findings: Sequence[Finding]) -> Findings:
        """Return the findings of a rule that gave plain ones; every path was judged."""
        if isinstance(findings, cls):
            return findings
        places, end = record.index.positions, len(record.index)
        positions = np.array([places.get(f.path, end) if f.path else end for f in findings], np.int64)
        values = np.array([f.value for f in findings], np.float64)
        limits = np.array([f.limit for f in findings], np.float64)
        text = next((f.message for f in findings if f.message), "").replace("{", "{{").replace("}", "}}")
        return cls(rule, record, positions, values, limits, text=text)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def is_of_the_end(self) -> bool:
        """Said of the record that ends a run."""
        return "end_of_run" in self._record.scalars

    @overload
    def __getitem__(self, i: int) -> Finding: ...
    @overload
    def __getitem__(self, i: slice) -> list[Finding]: ...
    def __getitem__(self, i: int | slice) -> Finding | list[Finding]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        position, paths = int(self.positions[i]), self._record.index.paths
        return Finding(
            rule=self._rule.rule_name,
            step=self._record.step,
            path=paths[position] if position < len(paths) else "",
            value=float(self.values[i]),
            limit=float(self.limits[i]),
            severity=self._rule.severity,
            name=self._rule.name,
            message=self.message(i),
        )

    def __iter__(self) -> Iterator[Finding]:
        return (self[i] for i in range(len(self)))

    def message(self, i: int) -> str:
        """Return what was seen at the i-th position, as a phrase."""
        return self.text.format(value=float(self.values[i]), limit=float(self.limits[i])) if self.text else ""

    def worst(self, low_is_worse: bool) -> int:
        """Return which of the findings is the worst; a non-finite value is worse than any other."""
        bad = np.flatnonzero(~np.isfinite(self.values))
        if len(bad):
            return int(bad[0])
        return int(np.argmin(self.values) if low_is_worse else np.argmax(self.values))

    def only(self, keep: Bools) -> Findings:
        """Return those of the findings, with all else the same."""
        parts = self.positions[keep], self.values[keep], self.limits[keep]
        return Findings(self._rule, self._record, *parts, judged=self.judged, reason=self.reason, text=self.text)


def format_findings(findings: Sequence[Finding], max_lines: int = 5) -> str:
    """Return one line per finding, the first `max_lines` and how many there are beside."""
    lines = [str(findings[i]) for i in range(min(len(findings), max_lines))]
    more = len(findings) - len(lines)
    return "\n".join([*lines, f"... and {more} more"] if more > 0 else lines)
