"""What rules say: findings, and incidents that group them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .._markup import Prints
from ._shown import incident_html

if TYPE_CHECKING:
    from ._case_file import CaseFile

__all__ = ["SEVERITIES", "Finding", "Incident"]

SEVERITIES = ("info", "warning", "critical")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding(Prints):
    """What a rule reports at one step for one path (`""`: the whole model). Prints as the sentence a user reads."""

    rule: str
    step: int
    path: str = ""
    value: float = float("nan")
    limit: float = float("nan")
    severity: str = "warning"
    name: str = ""
    message: str = ""

    def __str__(self) -> str:
        where = self.path or "whole model"
        what = self.message or f"{self.value:.3g}, limit {self.limit:.3g}"
        return f"step {self.step}, {where}: {self.name or self.rule} ({what})"


@dataclass(frozen=True, kw_only=True)
class Incident(Prints):
    """Findings of one rule grouped over paths and steps, with a beginning and an end.

    Attributes:
        rule: class name of the rule in snake case (`exploding`, `non_finite`).
        name: given in the rules file, else the rule's.
        severity: info, warning or critical.
        paths: every path that fired, in the order of the rule (forward for activations, backward for gradients).
        first_path: where it began, where that means something; "" for the whole model.
        first_step, last_step: of the findings.
        value, limit, message: of the worst finding; `message` is one sentence that says what was seen.
        worst_path, worst_step: which path they are of ("" for the whole model), and of which step; None where that is
            not on record.
        treatments: names of the treatments and actions that ran for it.
        advice: what usually causes it and what to try, in order.
        resolved: it is over; `resolved_step` says since when.
        count: steps at which it fired.
        labels: the rule's own labels.
        details: anything else (autopsy, files written beside it), plain values.
        case: what is known of it besides, in one place (see `CaseFile`); None where nobody kept it. No part of
            `to_json`: it has a file of its own.
    """

    rule: str
    first_step: int
    last_step: int
    name: str = ""
    severity: str = "warning"
    paths: tuple[str, ...] = ()
    first_path: str = ""
    value: float = float("nan")
    limit: float = float("nan")
    treatments: tuple[str, ...] = ()
    advice: str = ""
    message: str = ""
    resolved: bool = False
    resolved_step: int | None = None
    count: int = 1
    id: int = 0
    worst_path: str | None = None
    worst_step: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    case: CaseFile | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        where = (self.first_path or "whole model") + more
        what = self.seen or self._owned(f"{self.value:.3g}, limit {self.limit:.3g}")
        done = f" -> {', '.join(self.done)}" if self.treatments else ""
        return f"[{self.severity}] step {self.first_step}: {self.name or self.rule} in {where} ({what}){done}"

    @property
    def done(self) -> tuple[str, ...]:
        """What was done about it, in words where a treatment left some in `details` under its name: where a rollback
        went to."""
        said = [self.details.get(name) for name in self.treatments]
        return tuple(word if isinstance(word, str) else name for name, word in zip(self.treatments, said, strict=True))

    @property
    def worst_elsewhere(self) -> str:
        """Which path the numbers are of, where it is not the one it began in; "" where it is, is not known, or where
        there is no number."""
        if self.worst_path is None or self.worst_path == self.first_path or not np.isfinite(self.value):
            return ""
        return self.worst_path or "whole model"

    @property
    def seen(self) -> str:
        """The message, beginning with the path that it is of where it did not begin there."""
        return self._owned(self.message) if self.message else ""

    def _owned(self, text: str) -> str:
        # A sentence on the whole model says so itself.
        return f"{self.worst_path}: {text}" if self.worst_path and self.worst_elsewhere else text

    def _repr_html_(self) -> str:
        return incident_html(self)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; non-finite floats as the strings "nan", "inf" and "-inf", so that JSON stays JSON."""
        return {f: _plain(getattr(self, f)) for f in self.__dataclass_fields__ if f != "case"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Incident:
        known = {k: v for k, v in data.items() if k in cls.__dataclass_fields__ and k != "case"}
        for name in ("paths", "treatments"):
            known[name] = tuple(known.get(name, ()))
        for name in ("value", "limit"):
            known[name] = float(known.get(name, "nan"))
        return cls(**known)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else str(float(value))
    if isinstance(value, np.integer):
        return int(value)
    return value
