"""The engine: judges records by all rules of a book, and keeps their incidents."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError, GradwatchWarning
from ..records import Incident, Index, StepRecord
from ._case import Case
from ._judgement import Chain, Fired, Judgement, RuleCoverage
from ._rulebook import RuleBook, Silence
from ._slot import Slot, Verdict

__all__ = ["RuleEngine"]


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
        self._start: int | None = None
        self._step = -1
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
        since_start = record.step - (self._start or 0)
        slots = [slot for slot in self._slots if slot.is_late == (phase == "late")]
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

    def _judgement(self, verdicts: list[tuple[Slot, Verdict]]) -> Judgement:
        if not verdicts:
            return Judgement()
        fired = tuple(
            Fired(slot.rule, v.findings, v.then, v.stop, v.case) for slot, v in verdicts if v.case is not None and v.hit
        )
        said = [slot.said for slot, _ in verdicts if slot.said is not None and len(slot.said)]
        return Judgement(
            findings=Chain(said),
            fired=fired,
            opened=tuple(v.case.incident() for _, v in verdicts if v.case is not None and v.opened),
            resolved=tuple(v.case.incident() for _, v in verdicts if v.case is not None and v.resolved),
        )

    def _meet(self, record: StepRecord) -> None:
        if self._start is None:
            self._start = record.step
        self._step = record.step
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
            slot.disable(f"{type(error).__name__}: {error}")
            self._failed.append(slot.rule)
            warnings.warn(
                f"rule {slot.rule.name!r} raised {type(error).__name__} at step {record.step} and is disabled: {error}",
                GradwatchWarning,
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

    def limits(self) -> dict[str, float]:
        """Return the largest global norm that each rule would accept at the next step, where it has one."""
        found = {}
        for slot in self._slots:
            limit = None if slot.disabled else slot.rule.limit(slot.state)
            if limit is not None:
                found[slot.rule.name] = float(limit)
        return found

    def annotate(
        self, text: str, *, silence: int = 0, paths: str | Sequence[str] = "*", rules: str | Sequence[str] = "*"
    ) -> None:
        """Say what happens now (a switch of data, a restart), and let these rules open no incident for some steps.

        Rules go on judging, so that their baselines follow.

        Args:
            text: kept with the step.
            silence: steps from now.
            paths, rules: glob patterns of what is silent.
        """
        self._annotations.append((self._step + 1, str(text)))
        if silence > 0:
            self._silences.append(Silence(until=self._step + silence, rules=rules, paths=paths, reason=str(text)))

    def note_treatments(self, rule_name: str, names: Sequence[str]) -> None:
        """Add treatments and actions that ran to the going incident of a rule."""
        for slot in self._slots:
            if slot.case is not None and rule_name in (slot.rule.name, slot.rule.rule_name):
                slot.case.treatments.extend(n for n in names if n not in slot.case.treatments)

    def note_details(self, rule_name: str, details: Mapping[str, Any], first_path: str | None = None) -> None:
        """Add plain values (an autopsy, files) to the going incident of a rule, and where it began, if found out."""
        for slot in self._slots:
            if slot.case is not None and rule_name in (slot.rule.name, slot.rule.rule_name):
                slot.case.details.update(details)
                if first_path is not None:
                    slot.case.first_path = first_path

    def finish(self, step: int, scalars: Mapping[str, float] | None = None) -> tuple[Incident, ...]:
        """Judge the end of the run, at `step`; return the incidents that opened.

        Args:
            scalars: what was learnt after the last record (a last validation).
        """
        if self._index is None:
            return ()
        last = {**(scalars or {}), "end_of_run": 1.0}
        return self.judge(StepRecord(step=step, index=self._index, has_loss=False, scalars=last)).opened

    def coverage(self) -> list[RuleCoverage]:
        """Return, for each rule, how often it was judged, and why it was not."""
        return [
            RuleCoverage(name=s.rule.name, judged=s.judged, reason=s.reason, disabled=s.disabled) for s in self._slots
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values: str, int, float, bool, None, list, tuple, dict."""
        return {
            "version": 1,
            "start": self._start,
            "step": self._step,
            "paths": list(self._index.paths if self._index is not None else self._places or ()),
            "silences": [
                {"until": s.until, "rules": _plain(s.rules), "paths": _plain(s.paths), "reason": s.reason}
                for s in self._silences
            ],
            "annotations": [list(a) for a in self._annotations],
            "incidents": [i.to_json() for i in self._past],
            "cases": [{"rule": c.rule.name, **c.state_dict()} for c in self._cases],
            "rules": {slot.rule.name: slot.state_dict() for slot in self._slots},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; rules that are new begin afresh, those that are gone leave their incidents."""
        self._start, self._step = state["start"], state["step"]
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


def _plain(patterns: str | Sequence[str]) -> str | list[str]:
    return patterns if isinstance(patterns, str) else list(patterns)
