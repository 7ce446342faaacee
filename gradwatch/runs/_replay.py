"""A logged run, judged again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._markup import Prints, card
from ..records import (
    ENDED_WELL,
    Finding,
    Incident,
    Incidents,
    StepRecord,
    Verdict,
    incidents_html,
    judge_run,
    rank_incidents,
)
from ..rules import RuleBook, RuleCoverage, RuleEngine, RuleMemory
from ._recorded import Recorded

__all__ = ["Replay", "replay"]

MAX_FINDINGS = 100_000

COMPARED = (
    "rule", "name", "severity", "paths", "first_path", "first_step", "last_step", "value", "limit", "message",
    "resolved", "resolved_step", "count", "treatments",
)  # fmt: skip
"""What must be equal in a live incident and a replayed one; an autopsy's details can't be had from a log."""


@dataclass(kw_only=True)
class Replay(Prints):
    """What rules say of a logged run. Iterates over its incidents.

    Attributes:
        incidents: in the order they began.
        findings: of all steps, at most 100,000.
        coverage: how often each rule was judged, and why not, by rule.
        num_records: records judged.
        notes: what should be known when reading it (a folder that was thinned).
        ending: how the run ended, as `judge_run` takes it, and in words.
    """

    incidents: list[Incident] = field(default_factory=Incidents)
    findings: list[Finding] = field(default_factory=list)
    coverage: list[RuleCoverage] = field(default_factory=list)
    num_records: int = 0
    notes: list[str] = field(default_factory=list)
    ending: tuple[str, str] = (ENDED_WELL, "")

    def verdict(self) -> Verdict:
        """Return whether all was well by these rules, or why that can't be said."""
        ended, how = self.ending
        return judge_run(
            incidents=self.incidents, coverage=self.coverage, num_steps=self.num_records, ended=ended, how=how
        )

    def __str__(self) -> str:
        return "\n".join([str(self.verdict()), *map(str, self.notes), str(Incidents(self.incidents))])

    def _repr_html_(self) -> str:
        verdict = self.verdict()
        # Without any, the verdict alone says whether that means something.
        told = incidents_html(rank_incidents(self.incidents)) if self.incidents else ""
        return card(verdict.headline, verdict.tone, told, verdict.judged_html())

    def __iter__(self) -> Iterator[Incident]:
        return iter(self.incidents)

    def __len__(self) -> int:
        return len(self.incidents)

    def differences(self, incidents: Sequence[Incident]) -> list[str]:
        """Return how the incidents of a live run differ from the replayed ones, in sentences; [] where they don't.

        Incidents that no rule reported (a treatment that failed) are passed over.
        """
        rules = {c.name for c in self.coverage}
        live = [i for i in incidents if (i.name or i.rule) in rules]
        mine = {(i.name or i.rule, i.first_step, i.first_path): i for i in self.incidents}
        said = []
        for incident in live:
            other = mine.pop((incident.name or incident.rule, incident.first_step, incident.first_path), None)
            if other is None:
                said.append(f"only live: {incident}")
                continue
            for name in COMPARED:
                a, b = getattr(incident, name), getattr(other, name)
                if a != b and not (a != a and b != b):  # nan equals nan here  # noqa: PLR0124
                    said.append(f"{incident}: `{name}` was {a!r} live and is {b!r} in the replay")
        return said + [f"only in the replay: {incident}" for incident in mine.values()]


def replay(run: Recorded, book: Any, *, on_error: str = "warn", allow_code: bool = False) -> Replay:
    """Judge a run, or a log of another program, by rules; with the rules it ran under, it says what was said live.

    Args:
        run: from `read_run` or `read_log`.
        book: a RuleBook, or what `gradwatch.load_rules` takes: a preset's name, a file, a list of rules.
        on_error: "warn": a rule that raises gives one warning and is disabled; "raise": it raises.
        allow_code: rules that are named as `module:Class` may be imported; see `gradwatch.load_rules`.

    Raises:
        ConfigError: there are no such rules.
    """
    if not isinstance(book, RuleBook):
        from ..book import load_rules

        book = load_rules(book, allow_code=allow_code)
    engines: dict[int, RuleEngine] = {}
    result, waiting = Replay(ending=run._ending), list(run.annotations)
    returns = _Returns(waiting)
    last_step = -1
    for record in run.records():
        # Optimizers that step on their own (a GAN's) are judged apart, as they were live.
        number = int(record.scalars.get("optimizer", 0))
        if number not in engines:
            engines[number] = RuleEngine(book, on_error=on_error, new_id=lambda: _count(engines))
        while waiting and waiting[0]["after_step"] < record.step:
            _annotate(engines, waiting.pop(0))
        returns.meet(record.step, engines)
        _judge(engines[number], record, result)
        last_step = max(last_step, record.step)
    closing: dict[str, float] = {}
    for told in run.annotations:
        if told["after_step"] >= last_step:
            closing = told.get("closing", closing)
    returns.meet(last_step + 1, engines)
    for engine in engines.values():
        if run.complete:
            engine.finish(last_step, closing)
        result.coverage += engine.coverage()
    result.incidents = Incidents(sorted((i for e in engines.values() for i in e.incidents), key=lambda i: i.first_step))
    if run.thinned:
        result.notes.append(
            "Columns of some early steps were dropped to keep the folder small; rules did not see them."
        )
    return result


class _Returns:
    """Where the training was taken back: what rules remember went back with it."""

    def __init__(self, annotations: Sequence[dict[str, Any]]) -> None:
        self._told = [told["rolled_back"] for told in annotations if "rolled_back" in told]
        self._targets = sorted({told["to"] for told in self._told})
        self._memories: dict[int, dict[int, RuleMemory]] = {}

    def meet(self, step: int, engines: dict[int, RuleEngine]) -> None:
        """Say that this step is judged next."""
        while self._told and self._told[0]["from"] < step:
            told = self._told.pop(0)
            memories = self._memories.get(told["to"], {})
            for number, engine in engines.items():
                engine.note(told.get("rule", ""), ("rollback",), {})
                engine.go_back(memories.get(number), told["from"])
        while self._targets and self._targets[0] <= step:
            memory = {number: engine.memory() for number, engine in engines.items()}
            self._memories[self._targets.pop(0)] = memory


def _count(engines: dict[int, RuleEngine]) -> int:
    return sum(engine.num_incidents for engine in engines.values())


def _judge(engine: RuleEngine, record: StepRecord, result: Replay) -> None:
    early = engine.judge(record, "early")
    for report in record.treatments:
        if report.rule and report.applied:
            engine.note_treatments(report.rule, (report.name,), record.step)
    late = engine.judge(record, "late")
    result.num_records += 1
    room = MAX_FINDINGS - len(result.findings)
    for findings in (early.findings, late.findings):
        if len(findings) and room > 0:
            result.findings += list(findings)[:room]


def _annotate(engines: dict[int, RuleEngine], told: dict[str, Any]) -> None:
    if "rolled_back" in told:
        return
    if "closing" in told:  # of a session that ended before this one began
        return
    for engine in engines.values():
        engine.annotate(
            told.get("text", ""),
            silence=int(told.get("silence", 0)),
            paths=told.get("paths", "*"),
            rules=told.get("rules", "*"),
        )
