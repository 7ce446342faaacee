"""What the engine gives back for one record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..records import Finding, Incident, RuleCoverage
from ._case import Case
from ._rule import Rule

__all__ = ["Fired", "Judgement", "RuleCoverage", "Chain"]


@dataclass(frozen=True, eq=False)
class Fired:
    """A rule that fires at this step and is neither inhibited nor silenced.

    Attributes:
        rule: which.
        findings: of this step.
        then: treatments and actions to run now, within the rule's budget: treatments at every step it fires, actions
            when it begins to.
        stop: the rule fired `stop_after` times running: the training is to end.
    """

    rule: Rule
    findings: Sequence[Finding]
    then: tuple[Any, ...] = ()
    stop: bool = False
    case: Case | None = field(default=None, repr=False)

    @property
    def incident(self) -> Incident:
        """The incident it belongs to, as it stands."""
        assert self.case is not None
        return self.case.incident()


@dataclass(frozen=True, eq=False)
class Judgement:
    """What the rules said of one record.

    Attributes:
        findings: of all rules whose condition holds, muted ones included; a sequence per rule, chained.
        fired: rules that fire.
        guarding: rules that hold and are inhibited: they say nothing, and their treatments run all the same.
        opened, resolved: incidents that began, or ended, at this record.
    """

    findings: Sequence[Finding] = ()
    fired: tuple[Fired, ...] = ()
    guarding: tuple[Fired, ...] = ()
    opened: tuple[Incident, ...] = ()
    resolved: tuple[Incident, ...] = ()

    def followed_by(self, other: Judgement) -> Judgement:
        """Return both as one."""
        if not (other.findings or other.fired or other.guarding or other.opened or other.resolved):
            return self
        return Judgement(
            findings=Chain([part for part in (self.findings, other.findings) if len(part)]),
            fired=self.fired + other.fired,
            guarding=self.guarding + other.guarding,
            opened=self.opened + other.opened,
            resolved=self.resolved + other.resolved,
        )


class Chain(Sequence[Finding]):
    """Several sequences read as one."""

    def __init__(self, parts: Sequence[Sequence[Finding]]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = i + len(self) if i < 0 else i
        for part in self._parts:
            if i < len(part):
                return part[i]
            i -= len(part)
        raise IndexError(i)
