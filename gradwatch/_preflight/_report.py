"""What the checks say: findings, and the report that holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .._markup import Prints, card, escape, number, table, told
from ..records import SEVERITIES, Incident

__all__ = ["PreflightFinding", "PreflightReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightFinding(Prints):
    """One thing that a check found before training.

    Attributes:
        check: its name in snake case (`output_range`, `not_in_optimizer`, ...).
        message: one sentence: what was seen, with numbers.
        severity: info (worth knowing), warning (training will suffer) or critical (it can't work).
        path: module or parameter path; "" for the whole model, the loss or the batch.
        cause: what usually causes it.
        advice: what to try, in order.
        value, limit: what was measured, and what would have been accepted.
    """

    check: str
    message: str
    severity: str = "warning"
    path: str = ""
    cause: str = ""
    advice: str = ""
    value: float = float("nan")
    limit: float = float("nan")

    def __str__(self) -> str:
        where = f" at {self.path}" if self.path else ""
        return f"[{self.severity}] {self.check}{where}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class PreflightReport(Prints):
    """All findings, worst first. Prints as a table; true where `ok`.

    Attributes:
        findings: worst first, then in the order of the checks.
        checks: names of the checks that ran.
        skipped: check -> why it could not be made.
        measures: numbers that were taken on the way (`loss`, `loss_eval`, `loss_after_overfit`, `signal_gain`, ...).
        seconds: how long it took.
        can_learn: the loss depends on some parameter.
    """

    findings: tuple[PreflightFinding, ...] = ()
    checks: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    can_learn: bool = True

    def __post_init__(self) -> None:
        worst_first = sorted(self.findings, key=lambda f: -SEVERITIES.index(f.severity))
        object.__setattr__(self, "findings", tuple(worst_first))

    @property
    def ok(self) -> bool:
        """Nothing of severity warning or above was found."""
        return not self.alarms

    @property
    def alarms(self) -> tuple[PreflightFinding, ...]:
        """The findings of severity warning or above."""
        return tuple(f for f in self.findings if f.severity != "info")

    def __bool__(self) -> bool:
        return self.ok

    def __iter__(self) -> Iterator[PreflightFinding]:
        return iter(self.findings)

    def __str__(self) -> str:
        lines = [self._headline()]
        for finding in self.findings:
            lines.append(str(finding))
            lines += [f"    {label}: {text}" for label, text in _reasons(finding) if text]
        lines += [f"not checked: {name} ({why})" for name, why in self.skipped.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [
            (
                told(f.severity, f.severity),
                f"<code>{escape(f.check)}</code>",
                escape(f.path or "whole model"),
                escape(f.message)
                + "".join(f"<br><b>{label}:</b> {escape(text)}" for label, text in _reasons(f) if text),
            )
            for f in self.findings
        ]
        worst = self.findings[0].severity if self.findings else "good"
        made = table(("severity", "check", "where", "what"), rows) if rows else ""
        left = "".join(f"<div>not checked: {escape(name)} ({escape(why)})</div>" for name, why in self.skipped.items())
        taken = ((f"<code>{escape(name)}</code>", escape(number(value))) for name, value in self.measures.items())
        more = f"<details><summary>measured on the way</summary>{table(('number', 'value'), taken)}</details>"
        return card(self._headline(), worst, made, left, more if self.measures else "")

    def _headline(self) -> str:
        return f"Pre-flight: {self._verdict()} ({len(self.checks)} checks in {self.seconds:.1f} s)"

    def _verdict(self) -> str:
        num_alarms, num_remarks = len(self.alarms), len(self.findings) - len(self.alarms)
        if not self.findings:
            return "nothing found"
        return f"{num_alarms} to see to, {num_remarks} to know"

    def incidents(self, step: int = 0) -> tuple[Incident, ...]:
        """Return the findings as incidents of rules named `preflight_...`, for sinks and callbacks."""
        return tuple(
            Incident(
                rule=f"preflight_{f.check}",
                first_step=step,
                last_step=step,
                severity=f.severity,
                paths=(f.path,) if f.path else (),
                first_path=f.path,
                value=f.value,
                limit=f.limit,
                advice=" ".join(part for part in (f.cause, f.advice) if part),
                message=f.message,
            )
            for f in self.findings
        )


def _reasons(finding: PreflightFinding) -> tuple[tuple[str, str], ...]:
    return (("cause", finding.cause), ("try", finding.advice))
