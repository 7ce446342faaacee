"""One rule in the engine: its memory, the lives of its paths, its incident and its budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..records import Index, StepRecord
from ._acts import actions_of, then_of, treatments_of
from ._block import Block
from ._case import Case
from ._findings import Findings
from ._life import Life, advance
from ._rule import Rule
from ._rulebook import Silence
from ._state import from_plain, realign, to_plain

__all__ = ["Slot", "Verdict"]

NO_RECORD = "no record yet"
KNOWN_AFTER_THE_STEP = frozenset(
    {
        "update_norm",
        "update_ratio",
        "update_lost",
        "param_norm",
        "treatments",
        "skipped",
        "global_norm_after",
        "global_norm_applied",
        "end_of_run",
    }
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
    """What is kept of a rule, which holds settings only."""

    def __init__(self, rule: Rule) -> None:
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

        self.tells_beginning = any(getattr(item, "wants_beginning", False) for item in then_of(rule))
        self.is_late = bool((rule.wants | rule.needs) & KNOWN_AFTER_THE_STEP)

    @property
    def is_active(self) -> bool:
        """Whether a path is pending or firing, or an incident is going on."""
        return self.life is not None or self.case is not None

    def look(self, record: StepRecord, since_start: int) -> None:
        """Judge a record and move the lives of the paths on."""
        findings, self.state = self.rule.judge(record, self.state)
        said = Findings.of(self.rule, record, findings)
        self._count(said)
        in_warmup = since_start < self.rule.warmup
        self.life = advance(
            self.life,
            said.positions[:0] if in_warmup else said.positions,
            False if in_warmup else said.judged,
            n=len(record.index),
            step=record.step,
            for_steps=self.rule.for_steps,
            keep_firing_for=self.rule.keep_firing_for,
        )

    def pass_over(self, block: Block) -> bool:
        """Take in records in which the rule finds nothing; False, and nothing is changed, where it may find something.

        For a rule without a going incident or a path on its way to one.
        """
        before = self.state, self.judged, self.reason, self.said
        # What the end of a run lacks is no reason: it is looked at by itself.
        passed = None if block.has_any({"end_of_run"}) else self.rule.pass_over(block, self.state)
        if passed is not None:
            self.state, self.said = passed.state, None
            self.judged += passed.judged
            self.reason = passed.reason or ("" if self.reason == NO_RECORD else self.reason)
            return True
        for record in block.records:
            findings, self.state = self.rule.judge(record, self.state)
            self._count(Findings.of(self.rule, record, findings))
            if self.said is not None and len(self.said.positions):
                self.state, self.judged, self.reason, self.said = before
                return False
        return True

    def _count(self, said: Findings) -> None:
        self.said = said
        if said.judged is False:
            # The record that ends a run has nothing but its end: what is missing there is not why nothing was judged.
            if self.reason in ("", NO_RECORD) or not said.is_of_the_end:
                self.reason = said.reason or "not judged"
        else:
            self.judged += 1
            self.reason = "" if self.reason == NO_RECORD else self.reason

    def alarm(self, since_start: int) -> float | None:
        """Return the global norm above which the rule would fire at the next record, and treat; None where none would
        make it."""
        late = self.rule.for_steps > 1 or self.streak + 1 < self.rule.treat_after
        spent = self.rule.max_fires and self.fires >= self.rule.max_fires and self.case is None
        if self.disabled or late or spent or since_start < self.rule.warmup:
            return None
        alarm = self.rule.alarm(self.state)
        return None if alarm is None else float(alarm)

    def calm(self, records: int) -> float:
        """Return the global norm up to which the rule finds nothing in it, in so many records from now on."""
        return float(self.rule.calm(self.state, records))

    def inhibits_at(self, step: int) -> bool:
        """Return whether it silences its targets now: it fires, or did so at most `inhibit_for` steps ago."""
        if self.life is not None and self.life.firing.any():
            return True
        return self.last_hit >= 0 and step - self.last_hit <= self.rule.inhibit_for

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
        guarded = hits if muted else hits.only(np.zeros(len(hits), np.bool_))
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
        if len(guarded) and self.rule.treat_after <= 1:
            # Another rule speaks for this one; it treats all the same.
            silent = self._loud(record, guarded, False, silences)
            return Verdict(silent, self.case, then=treatments_of(self.rule) if len(silent) else ())
        return Verdict(self.said, self.case)

    def _hits(self, record: StepRecord) -> Findings:
        assert self.said is not None
        if self.life is None or not len(self.said.positions):
            return self.said.only(np.zeros(len(self.said.positions), np.bool_))
        return self.said.only(self.life.firing[self.said.positions])

    def _loud(self, record: StepRecord, hits: Findings, muted: bool, silences: Sequence[Silence]) -> Findings:
        spent = self.rule.max_fires and self.fires >= self.rule.max_fires and self.case is None
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
            recent = last is not None and record.step - (last.resolved_step or 0) < self.rule.cooldown
            if last is not None and recent:
                self.case, last.resolved_step = last, None
            else:
                self.case, opened = new_case(self.rule, record.step), True
                self.fires += 1
        self.case.add(record, hits)
        if self.tells_beginning and not self.streak:
            self.case.details["began"] = self._beginning(record.step, hits)
        self.streak += 1
        stop_after = self.rule.stop_after
        stop = bool(stop_after) and self.streak >= stop_after
        return Verdict(hits, self.case, hit=True, opened=opened, then=self._then(record.step), stop=stop)

    def _beginning(self, step: int, hits: Findings) -> int:
        """Return the first step at which the condition held that now made it fire."""
        since = np.full(1, np.nan) if self.life is None else self.life.since[hits.positions]
        return int(np.nanmin(np.append(since, step)))

    def _then(self, step: int) -> tuple[Any, ...]:
        """Return treatments at every step from `treat_after` on, and actions at the first of these, in their budget,
        or in one of their own."""
        if self.streak < self.rule.treat_after:
            return ()
        then, actions = then_of(self.rule), list(actions_of(self.rule))
        if actions:
            window = self.rule.action_window
            self.action_steps = [s for s in self.action_steps if step - s < window]
            first = self.streak == self.rule.treat_after
            own = [item for item in actions if getattr(item, "keeps_own_budget", False)]
            if first and len(self.action_steps) < self.rule.max_actions:
                if len(own) < len(actions):
                    self.action_steps.append(step)
                actions = []
            elif first:
                actions = [item for item in actions if item not in own]
        return tuple(item for item in then if item not in actions)

    def disable(self, reason: str) -> None:
        """Switch the rule off for good."""
        self.disabled, self.reason, self.life, self.said = True, reason, None, None
        if self.case is not None:
            self.case, self.last_case = None, self.case

    def go_back(self, state: Any, step: int) -> Case | None:
        """Remember what was remembered before, with no path on its way to fire; return the incident that this ends.

        What comes of the trouble afterwards is an incident of its own.
        """
        self.state, self.life, self.said, self.streak = state, None, None, 0
        case, self.case, self.last_case = self.case, None, None
        if case is not None:
            case.resolved_step, case.member = step, None
        return case

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
