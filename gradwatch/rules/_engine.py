"""The engine: judges records by all rules of a book, and keeps their incidents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from .._warn import one_line, warn
from ..errors import ConfigError
from ..records import Incident, Index, StepRecord
from ._acts import treatments_of
from ._block import Block
from ._case import Case
from ._judgement import Chain, Fired, Judgement, RuleCoverage
from ._rulebook import RuleBook, Silence
from ._slot import Slot, Verdict
from ._state import realign
from ._strips import Strips

__all__ = ["RuleEngine", "RuleMemory"]


@dataclass(frozen=True, eq=False)
class RuleMemory:
    """What rules remembered at a step.

    Attributes:
        paths: of the index then.
        states: by the rules' names.
    """

    paths: tuple[str, ...]
    states: Mapping[str, Any]


class RuleEngine:
    """Judges records, one after another. Nothing of it depends on a trainer: replay gives the same incidents.

    Args:
        book: the rules.
        on_error: "warn": a rule that raises gives one warning and is disabled; "raise": it raises.
        new_id: gives each incident its number, where several engines judge one run; None: they are counted.
    """

    def __init__(self, book: RuleBook, *, on_error: str = "warn", new_id: Callable[[], int] | None = None) -> None:
        if on_error not in ("warn", "raise"):
            raise ConfigError(f"`on_error` must be 'warn' or 'raise'. Got {on_error!r}.")
        self.book = book
        self._on_error = on_error
        self._new_id = new_id or (lambda: self.num_incidents)
        self._slots = [Slot(rule) for rule in book.rules]
        by_name = {slot.rule.name: slot for slot in self._slots}
        sources = {s.rule.name: [by_name[r.name] for r in book.sources(s.rule)] for s in self._slots}
        # Of two rules that inhibit each other the first in the book speaks.
        places = {slot.rule.name: i for i, slot in enumerate(self._slots)}
        self._sources = {
            slot.rule.name: [
                s
                for s in sources[slot.rule.name]
                if slot not in sources[s.rule.name] or places[s.rule.name] < places[slot.rule.name]
            ]
            for slot in self._slots
        }
        self._silences: list[Silence] = list(book.silences)
        self._annotations: list[tuple[int, str]] = []
        self._cases: list[Case] = []
        self._failed: list[Any] = []
        self._past: list[Incident] = []
        self._strips = Strips()
        self._start: int | None = None
        self._step = -1
        self._lr = math.nan
        self._index: Index | None = None
        self._places: dict[str, int] | None = None

    @property
    def incidents(self) -> list[Incident]:
        """All incidents so far as they stand, in the order in which they began."""
        return sorted([*self._past, *(case.incident() for case in self._cases)], key=lambda i: i.id)

    @property
    def num_incidents(self) -> int:
        """How many incidents there have been."""
        return len(self._past) + len(self._cases)

    @property
    def annotations(self) -> list[tuple[int, str]]:
        """What `annotate` was told, with its step."""
        return list(self._annotations)

    def judge(self, record: StepRecord, phase: str = "all") -> Judgement:
        """Return what the rules say of one record.

        Args:
            record: of one step.
            phase: `"early"`: the rules that need nothing of what comes after the optimizer's step, so that they can act
                in it; `"late"`: the others, on the completed record; `"all"`: one after the other, as in a replay.
        """
        if phase == "all":
            early, late = self.judge(record, "early"), self.judge(record, "late")
            return early.followed_by(late)
        self._meet(record)
        slots = [slot for slot in self._slots if slot.is_late == (phase == "late")]
        return self._judge_by(slots, record)

    def _judge_by(self, slots: Sequence[Slot], record: StepRecord) -> Judgement:
        since_start = record.step - (self._start or 0)
        for slot in slots:
            if not slot.disabled:
                self._look(slot, record, since_start)
        muted: dict[str, bool] = {}
        verdicts = []
        for slot in slots:
            if slot.is_active and not slot.disabled:
                silences = [s for s in self._silences if s.covers(record.step, slot.rule)]
                mute = self._is_muted(slot, muted, record.step, ())
                verdicts.append((slot, slot.conclude(record, mute, silences, self._new_case)))
        return self._judgement(verdicts)

    def judge_all(self, records: Sequence[StepRecord]) -> list[Judgement]:
        """Return what `judge` says of each of these, one after another.

        Rules that find nothing in any of them are asked once about all.
        """
        index = records[0].index
        # Where the index changes, what is remembered of paths has to move first.
        if self._index is index and all(record.index is index for record in records):
            active = [slot for slot in self._slots if slot.is_active and not slot.disabled]
            if self._pass_over(records, [s for s in self._slots if not (s.is_active or s.disabled)]):
                early, late = ([s for s in active if s.is_late == is_late] for is_late in (False, True))
                return [self._judge_few(record, early, late) for record in records]
        return [self.judge(record) for record in records]

    def _judge_few(self, record: StepRecord, early: Sequence[Slot], late: Sequence[Slot]) -> Judgement:
        self._meet(record)
        if not (early or late):
            return _NOTHING_SAID
        return self._judge_by(early, record).followed_by(self._judge_by(late, record))

    def _pass_over(self, records: Sequence[StepRecord], slots: Sequence[Slot]) -> bool:
        """Let rules without a going incident take in records in which none of them finds anything.

        Returns:
            False, and nothing is changed, where one may find something.
        """
        block = Block(records)
        before = [(slot.state, slot.judged, slot.reason, slot.said) for slot in slots]
        try:
            if all(slot.pass_over(block) for slot in slots):
                return True
        except Exception:  # said, and the rule disabled, when the records are judged one after another
            pass
        for slot, kept in zip(slots, before, strict=True):
            slot.state, slot.judged, slot.reason, slot.said = kept
        return False

    def _judgement(self, verdicts: list[tuple[Slot, Verdict]]) -> Judgement:
        if not verdicts:
            return Judgement()
        fired = tuple(
            Fired(slot.rule, v.findings, v.then, v.stop, v.case) for slot, v in verdicts if v.case is not None and v.hit
        )
        guarding = tuple(Fired(slot.rule, v.findings, v.then) for slot, v in verdicts if v.then and not v.hit)
        said = [slot.said for slot, _ in verdicts if slot.said is not None and len(slot.said)]
        return Judgement(
            findings=Chain(said),
            fired=fired,
            guarding=guarding,
            opened=tuple(v.case.incident() for _, v in verdicts if v.case is not None and v.opened),
            resolved=tuple(v.case.incident() for _, v in verdicts if v.case is not None and v.resolved),
        )

    def _meet(self, record: StepRecord) -> None:
        if self._start is None:
            self._start = record.step
        if record.step != self._step and self._strips.add():
            self._strips.mark([slot.judged for slot in self._slots])
        self._step = record.step
        if not math.isnan(record.lr):
            self._lr = record.lr
        if record.index is self._index:
            return
        old = self._index.positions if self._index is not None else self._places
        if old is not None and tuple(old) != record.index.paths:
            for slot in self._slots:
                slot.realign(old, record.index)
        self._index, self._places = record.index, None

    def _look(self, slot: Slot, record: StepRecord, since_start: int) -> None:
        try:
            slot.look(record, since_start)
        except Exception as error:
            if self._on_error == "raise":
                raise
            slot.disable(one_line(error))
            self._failed.append(slot.rule)
            warn(
                f"rule {slot.rule.name!r} raised {type(error).__name__} at step {record.step} and is disabled: "
                f"{one_line(str(error))}",
                stacklevel=4,
            )

    def take_failed(self) -> list[Any]:
        """Return the rules that raised, and are disabled, since this was last asked."""
        failed, self._failed = self._failed, []
        return failed

    def _is_muted(self, slot: Slot, known: dict[str, bool], step: int, above: tuple[str, ...]) -> bool:
        """Return whether a rule that fires, and is not itself muted, inhibits this one."""
        name = slot.rule.name
        if name not in known:
            sources = [s for s in self._sources[name] if s.inhibits_at(step) and s.rule.name not in (*above, name)]
            mute = any(not self._is_muted(s, known, step, (*above, name)) for s in sources)
            if above:
                return mute
            known[name] = mute
        return known[name]

    def _new_case(self, rule: Any, step: int) -> Case:
        case = Case(id=self._new_id(), rule=rule, first_step=step, last_step=step)
        self._cases.append(case)
        return case

    def alarms(self, step: int) -> dict[str, float]:
        """Return the global norms above which rules would fire at `step`, and their treatments act, by rules' names.

        Of the rules that a norm alone makes fire at once: none that must hold for several steps, is in its warm-up,
        silenced, or has used up its budget.
        """
        since_start = step - (self._start or 0)
        found = {}
        for slot in self._slots:
            alarm = slot.alarm(since_start) if treatments_of(slot.rule) else None
            silences = [s for s in self._silences if s.covers(step, slot.rule)]
            if alarm is not None and not any("*" in _listed(s.paths) for s in silences):
                found[slot.rule.name] = alarm
        return found

    def calm(self, records: int) -> float:
        """Return the global norm up to which no rule finds anything in it, in so many records from now on."""
        return min([slot.calm(records) for slot in self._slots if not slot.disabled], default=math.inf)

    def limits(self) -> dict[str, float]:
        """Return the largest global norm that each rule would accept at the next step, where it has one."""
        found = {}
        for slot in self._slots:
            limit = None if slot.disabled else slot.rule.limit(slot.state)
            if limit is not None:
                found[slot.rule.name] = float(limit)
        return found

    @property
    def is_troubled(self) -> bool:
        """Whether a rule that can take the training back is on its way to fire, or fires."""
        return any(slot.is_active and slot.tells_beginning for slot in self._slots)

    def memory(self) -> RuleMemory:
        """Return what the rules remember now, for `go_back`."""
        return RuleMemory(
            paths=tuple(self._index.paths if self._index is not None else self._places or ()),
            states={slot.rule.name: deepcopy(slot.state) for slot in self._slots},
        )

    def go_back(self, memory: RuleMemory | None, step: int) -> tuple[Incident, ...]:
        """Remember what was remembered then, as the weights have become what they were then: incidents that go on
        are over, at `step`, and are returned.

        Args:
            memory: from `memory`; None: from before the first record.
            step: the last that was judged.
        """
        ended = []
        for slot in self._slots:
            known = memory is not None and slot.rule.name in memory.states
            state = deepcopy(memory.states[slot.rule.name]) if memory is not None and known else slot.rule.init()
            if memory is not None and self._index is not None and memory.paths != self._index.paths:
                state = realign(state, {p: i for i, p in enumerate(memory.paths)}, self._index)
            case = slot.go_back(state, step)
            ended += [] if case is None else [case.incident()]
        return tuple(ended)

    def annotate(
        self,
        text: str,
        *,
        silence: int = 0,
        paths: str | Sequence[str] = "*",
        rules: str | Sequence[str] = "*",
        step: int | None = None,
    ) -> None:
        """Say what happens now (a switch of data, a restart), and let these rules open no incident for some steps.

        Rules go on judging, so that their baselines follow.

        Args:
            text: kept with the step.
            silence: steps from now.
            paths, rules: glob patterns of what is silent.
            step: that begins now; None: the one after the last that was judged.
        """
        now = self._step + 1 if step is None else step
        self._annotations.append((now, str(text)))
        if silence > 0:
            last = now + silence - 1
            self._silences.append(Silence(since=now, until=last, rules=rules, paths=paths, reason=str(text)))

    def note_treatments(self, rule_name: str, names: Sequence[str], step: int | None = None) -> None:
        """Add treatments and actions that ran to the going incident of a rule, and the step at which the first did."""
        for slot in self._slots:
            if slot.case is not None and rule_name in (slot.rule.name, slot.rule.rule_name):
                slot.case.treatments.extend(n for n in names if n not in slot.case.treatments)
                if step is not None:
                    slot.case.details.setdefault("treated_at", step)

    def note_details(self, rule_name: str, details: Mapping[str, Any], first_path: str | None = None) -> None:
        """Add plain values (an autopsy, files) to the going incident of a rule, and where it began, if found out."""
        for slot in self._slots:
            if slot.case is not None and rule_name in (slot.rule.name, slot.rule.rule_name):
                slot.case.details.update(details)
                if first_path is not None:
                    slot.case.first_path = first_path

    def note(self, rule_name: str, names: Sequence[str], details: Mapping[str, Any]) -> tuple[Incident, ...]:
        """Add treatments and plain values to the last incident of a rule, also where it is over; return it."""
        noted = []
        for slot in self._slots:
            case = slot.case or slot.last_case
            if case is not None and rule_name == slot.rule.name:
                case.treatments.extend(n for n in names if n not in case.treatments)
                case.details.update(details)
                noted.append(case.incident())
        return tuple(noted)

    def finish(self, step: int, scalars: Mapping[str, float] | None = None) -> tuple[Incident, ...]:
        """Judge the end of the run, at `step`; return the incidents that opened.

        Args:
            scalars: what was learnt after the last record (a last validation).
        """
        if self._index is None:
            return ()
        last = {**(scalars or {}), "end_of_run": 1.0}
        record = StepRecord(step=step, index=self._index, has_loss=False, lr=self._lr, scalars=last)
        return self.judge(record).opened

    def coverage(self) -> list[RuleCoverage]:
        """Return, for each rule, how often it was judged, and why it was not."""
        strips = self._strips.of([slot.judged for slot in self._slots])
        return [
            RuleCoverage(
                name=slot.rule.name,
                judged=slot.judged,
                reason=slot.reason,
                disabled=slot.disabled,
                seen=self._strips.count,
                enough=slot.rule.enough,
                is_core=slot.rule.is_core,
                strip=strip,
            )
            for slot, strip in zip(self._slots, strips, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values: str, int, float, bool, None, list, tuple, dict."""
        return {
            "version": 1,
            "start": self._start,
            "step": self._step,
            "lr": self._lr,
            "paths": list(self._index.paths if self._index is not None else self._places or ()),
            "silences": [
                {
                    "since": s.since,
                    "until": s.until,
                    "rules": _plain(s.rules),
                    "paths": _plain(s.paths),
                    "reason": s.reason,
                }
                for s in self._silences
            ],
            "annotations": [list(a) for a in self._annotations],
            "incidents": [i.to_json() for i in self._past],
            "cases": [{"rule": c.rule.name, **c.state_dict()} for c in self._cases],
            "rules": {slot.rule.name: slot.state_dict() for slot in self._slots},
            "seen": self._strips.count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; rules that are new begin afresh, those that are gone leave their incidents."""
        self._start, self._step = state["start"], state["step"]
        self._lr = state.get("lr", math.nan)
        self._index, self._places = None, {p: i for i, p in enumerate(state["paths"])} or None
        self._silences = [Silence(**s) for s in state["silences"]]
        self._annotations = [(int(a[0]), str(a[1])) for a in state["annotations"]]
        self._past = [Incident.from_json(i) for i in state["incidents"]]
        rules = {slot.rule.name: slot.rule for slot in self._slots}
        self._cases = []
        for entry in state["cases"]:
            values = {k: v for k, v in entry.items() if k != "rule"}
            if entry["rule"] in rules:
                self._cases.append(Case.from_state(rules[entry["rule"]], values))
            else:
                known = {k: v for k, v in values.items() if k in Incident.__dataclass_fields__}
                self._past.append(Incident.from_json({**known, "rule": entry["rule"]}))
        cases = {case.id: case for case in self._cases}
        for slot in self._slots:
            if slot.rule.name in state["rules"]:
                slot.load_state_dict(state["rules"][slot.rule.name], cases)
        self._strips = Strips(int(state.get("seen", 0)), [slot.judged for slot in self._slots])


_NOTHING_SAID = Judgement()


def _listed(patterns: str | Sequence[str]) -> Sequence[str]:
    return (patterns,) if isinstance(patterns, str) else patterns


def _plain(patterns: str | Sequence[str]) -> str | list[str]:
    return patterns if isinstance(patterns, str) else list(patterns)
