"""A set of rules and who silences whom."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, UnknownNameError
from ..protocols import Rule as RuleProtocol
from ..protocols import Statistic
from ..records import select_paths
from ._rule import Rule, as_rule

__all__ = ["INHIBITS", "RuleBook", "Silence"]

INHIBITS: dict[str, tuple[str, ...]] = {
    "non_finite": ("*",),
    "not_updating": ("not_learning", "dead", "update_too_small", "dead_signal"),
    "constant_output": ("dead", "not_learning", "dead_units", "update_too_small"),
    "diverging": ("update_too_large", "loss_spike", "not_learning"),
    "blown_up": ("loss_spike", "exploding"),
    "amp_overflow": ("non_finite",),
}
"""Rule -> rules that stay silent while it fires."""


@dataclass(frozen=True, kw_only=True)
class Silence:
    """Rules and paths that open no incident up to a step, the last one included.

    Attributes:
        until: last silent step; -1: for good.
        since: first silent step.
        rules, paths: glob patterns.
        reason: shown with it.
    """

    until: int = -1
    since: int = 0
    rules: str | Sequence[str] = "*"
    paths: str | Sequence[str] = "*"
    reason: str = ""

    def covers(self, step: int, rule: Any) -> bool:
        """Return whether it holds for this rule at this step."""
        return (
            self.since <= step
            and (self.until < 0 or step <= self.until)
            and bool(select_paths([rule.name, rule.rule_name], self.rules).any())
        )


class RuleBook:
    """Rules that are judged together. Iterates over its rules.

    Args:
        rules: each with a name of its own.
        inhibits: rule name -> names of rules that stay silent while it fires, added to the built-in graph; a name of
            the built-in graph given here replaces its entry. "*" stands for all others.
        silences: what to say nothing about, from the start.
        statistics: measurements that the rules read, beside the built-in ones.

    Raises:
        ConfigError: something that is no rule, or two rules of one name.
    """

    def __init__(
        self,
        rules: Iterable[RuleProtocol] = (),
        *,
        inhibits: Mapping[str, str | Sequence[str]] | None = None,
        silences: Sequence[Silence] = (),
        statistics: Sequence[Statistic] = (),
    ) -> None:
        self.rules = tuple(as_rule(rule) for rule in rules)
        self.silences = tuple(silences)
        self.statistics = tuple(statistics)
        self._check_names()
        given = {k: (v,) if isinstance(v, str) else tuple(v) for k, v in (inhibits or {}).items()}
        self.inhibits: dict[str, tuple[str, ...]] = {**INHIBITS, **given}
        known = {n for r in self.rules for n in (r.name, r.rule_name)} | set(_catalogue()) | set(INHIBITS)
        for name in (*given, *(target for targets in given.values() for target in targets if target != "*")):
            if name not in known:
                raise UnknownNameError("rule", name, known, where="inhibits")

    def _check_names(self) -> None:
        seen: set[str] = set()
        for rule in self.rules:
            if rule.name in seen:
                raise ConfigError(f"two rules are named {rule.name!r}. Give one of them another with `name=`.")
            seen.add(rule.name)

    @property
    def needs(self) -> set[str]:
        """Columns and scalars that some rule reads."""
        return {name for rule in self.rules for name in rule.wants}

    def sources(self, rule: Rule) -> tuple[Rule, ...]:
        """Return the rules that silence this one while they fire."""
        found = []
        for source in self.rules:
            if source is rule:
                continue
            targets = {*self.inhibits.get(source.rule_name, ()), *self.inhibits.get(source.name, ())}
            targets |= set(source.inhibits)
            if targets & {"*", rule.name, rule.rule_name}:
                found.append(source)
        return tuple(found)

    def __len__(self) -> int:
        return len(self.rules)

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def __getitem__(self, name: str) -> Rule:
        for rule in self.rules:
            if rule.name == name:
                return rule
        raise UnknownNameError("rule", name, [r.name for r in self.rules])

    def __contains__(self, name: object) -> bool:
        return any(rule.name == name for rule in self.rules)

    def __repr__(self) -> str:
        return f"RuleBook({[rule.name for rule in self.rules]})"


def _catalogue() -> Mapping[str, type]:
    from . import RULES

    return RULES
