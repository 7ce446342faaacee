"""One rule in the engine: its memory, the lives of its paths, its incident and its budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..records import Index, StepRecord
from ._case import Case
from ._findings import Findings
from ._life import Life, advance
from ._rulebook import Silence
from ._state import from_plain, realign, to_plain

__all__ = ["Slot", "Verdict"]

NO_RECORD = "no record yet"
KNOWN_AFTER_THE_STEP = frozenset(
    {"update_norm", "update_ratio", "param_norm", "treatments", "skipped", "global_norm_after", "end_of_run"}
)
"""What a record holds only once the optimizer has stepped: rules that read it are judged then."""


@dataclass(frozen=True, eq=False)
class Verdict:
    """What became of one rule at one record."""

    findings: Findings
    case: Case | None = None
    hit: bool = False
    opened: bool = False
    resolved: bool = False
    then: tuple[Any, ...] = ()
    stop: bool = False


class Slot:
    """Settings come from the rule; rules that only satisfy the protocol get the defaults."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        self.state = rule.init()
        self.life: Life | None = None
        self.case: Case | None = None
        self.said: Findings | None = None
        self.judged = 0
        self.reason = NO_RECORD
        self.disabled = False
        self.fires = 0
        self.streak = 0
        self.last_hit = -1
        self.last_case: Case | None = None
        self.action_steps: list[int] = []

        wants = {*getattr(rule, "wants", ()), *getattr(rule, "needs", ())}
        self.is_late = bool(wants & KNOWN_AFTER_THE_STEP)

    def _setting(self, name: str, default: int = 0) -> int:
        return int(getattr(self.rule, name, default))

    @property
    def is_active(self) -> bool:
        """Whether a path is pending or firing, or an incident is going on."""
        return self.life is not None or self.case is not None

    def look(self, record: StepRecord, since_start: int) -> None:
        """Judge a record and move the lives of the paths on."""
        findings, self.state = self.rule.judge(record, self.state)
        self.said = said = Findings.of(self.rule, record, findings)
        if said.judged is False:
            self.reason = said.reason or "not judged"
        else:
            self.judged += 1
            self.reason = "" if self.reason == NO_RECORD else self.reason
        in_warmup = since_start < self._setting("warmup")
        self.life = advance(
            self.life,
            said.positions[:0] if in_warmup else said.positions,
            False if in_warmup else said.judged,
            n=len(record.index),
            step=record.step,
            for_steps=self._setting("for_steps", 1),
            keep_firing_for=self._setting("keep_firing_for", 20),
        )

    def inhibits_at(self, step: int) -> bool:
        """Return whether it silences its targets now: it fires, or did so at most `inhibit_for` steps ago."""
        if self.life is not None and self.life.firing.any():
            return True
        return self.last_hit >= 0 and step - self.last_hit <= self._setting("inhibit_for")

    def conclude(
        self,
        record: StepRecord,
        muted: bool,
        silences: Sequence[Silence],
        new_case: Callable[[Any, int], Case],
    ) -> Verdict:
        """Open, go on with, or resolve the incident."""
        assert self.said is not None
        hits = self._hits(record)
        if len(hits):
            self.last_hit = record.step
        hits = self._loud(record, hits, muted, silences)
        if len(hits):
            return self._go_on(record, hits, new_case)
        self.streak = 0 if self.said.judged is not False else self.streak
        if self.case is not None and (self.life is None or not self.life.firing.any()):
            case, self.case = self.case, None
            case.resolved_step = record.step
            case.member = None
            self.last_case = case
            return Verdict(self.said, case, resolved=True)
        return Verdict(self.said, self.case)

    def _hits(self, record: StepRecord) -> Findings:
        assert self.said is not None
        if self.life is None or not len(self.said.positions):
            return self.said.only(np.zeros(len(self.said.positions), np.bool_))
        return self.said.only(self.life.firing[self.said.positions])

    def _loud(self, record: StepRecord, hits: Findings, muted: bool, silences: Sequence[Silence]) -> Findings:
        spent = self._setting("max_fires") and self.fires >= self._setting("max_fires") and self.case is None
        if not len(hits) or muted or spent:
            return hits.only(np.zeros(len(hits), np.bool_))
        for silence in silences:
            silent = np.append(record.index.select(_patterns(silence.paths)), "*" in _patterns(silence.paths))
            hits = hits.only(~silent[hits.positions])
        return hits

    def _go_on(self, record: StepRecord, hits: Findings, new_case: Callable[[Any, int], Case]) -> Verdict:
        opened = False
        if self.case is None:
            last = self.last_case
            recent = last is not None and record.step - (last.resolved_step or 0) < self._setting("cooldown")
            if last is not None and recent:
                self.case, last.resolved_step = last, None
            else:
                self.case, opened = new_case(self.rule, record.step), True
                self.fires += 1
        self.case.add(record, hits)
        self.streak += 1
        stop_after = self._setting("stop_after")
        stop = bool(stop_after) and self.streak >= stop_after
        return Verdict(hits, self.case, hit=True, opened=opened, then=self._then(record.step), stop=stop)

    def _then(self, step: int) -> tuple[Any, ...]:
        """Return treatments at every step from `treat_after` on, and actions at the first of these, in their budget."""
        if self.streak < self._setting("treat_after", 1):
            return ()
        then = tuple(getattr(self.rule, "then", ()))
        actions = [item for item in then if not hasattr(item, "apply_")]
        if actions:
            window = self._setting("action_window", 1000)
            self.action_steps = [s for s in self.action_steps if step - s < window]
            first = self.streak == self._setting("treat_after", 1)
            if first and len(self.action_steps) < self._setting("max_actions", 5):
                self.action_steps.append(step)
                actions = []
        return tuple(item for item in then if item not in actions)

    def disable(self, reason: str) -> None:
        """Switch the rule off for good."""
        self.disabled, self.reason, self.life, self.said = True, reason, None, None
        if self.case is not None:
            self.case, self.last_case = None, self.case

    def realign(self, old: Mapping[str, int], new: Index) -> None:
        """Move what is kept per path to another index."""
        self.state = realign(self.state, old, new)
        if self.case is not None:
            self.case.member = None
        if self.life is not None:
            source = np.array([*(old.get(p, -1) for p in new.paths), len(self.life.firing) - 1], np.int64)
            fresh = Life.inactive(len(new))
            known = source >= 0
            for target, values in zip(fresh, self.life, strict=True):
                target[known] = values[source[known]]
            self.life = fresh

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "state": to_plain(self.state),
            "life": None if self.life is None else [to_plain(part) for part in self.life],
            "case": None if self.case is None else self.case.id,
            "last_case": None if self.last_case is None else self.last_case.id,
            "judged": self.judged,
            "reason": self.reason,
            "disabled": self.disabled,
            "fires": self.fires,
            "streak": self.streak,
            "last_hit": self.last_hit,
            "action_steps": list(self.action_steps),
        }

    def load_state_dict(self, state: Mapping[str, Any], cases: Mapping[int, Case]) -> None:
        """Go on from a `state_dict`."""
        self.state = from_plain(state["state"], like=self.rule.init())
        self.life = None if state["life"] is None else Life(*(from_plain(part) for part in state["life"]))
        self.case = cases.get(state["case"]) if state["case"] is not None else None
        self.last_case = cases.get(state["last_case"]) if state["last_case"] is not None else None
        for name in ("judged", "reason", "disabled", "fires", "streak", "last_hit"):
            setattr(self, name, state[name])
        self.action_steps = list(state["action_steps"])


def _patterns(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
