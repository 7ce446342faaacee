"""The rules' side of the engine: one rule engine per optimizer, their incidents together, and gradwatch's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..records import Incident, StepRecord
from ..rules import Judgement, RuleBook, RuleEngine, RuleMemory, can_decide
from ._timed import calm_numpy

__all__ = ["Judge", "own_incident"]


class Judge:
    """Judges records, with a memory for each optimizer that steps on its own (a GAN's two norms don't mix).

    Args:
        book: the rules.
        on_error: see `MeasureOptions`.
        on_incident: called with every incident that is opened or changes.
    """

    def __init__(self, book: RuleBook, *, on_error: str, on_incident: Callable[[Incident], None]) -> None:
        self.book = book
        self._on_error = on_error
        self.on_incident = on_incident
        self._engines: dict[int, RuleEngine] = {}
        self._own: list[Incident] = []
        self._waiting: dict[str, Any] = {}

    def engine(self, optimizer: int) -> RuleEngine:
        """Return the rule engine of one optimizer, made when it is first asked for."""
        if optimizer not in self._engines:
            engine = RuleEngine(self.book, on_error=self._on_error, new_id=self._new_id)
            state = self._waiting.pop(str(optimizer), None)
            if state is not None:
                engine.load_state_dict(state)
            self._engines[optimizer] = engine
        return self._engines[optimizer]

    def _new_id(self) -> int:
        waiting = sum(len(state["incidents"]) + len(state["cases"]) for state in self._waiting.values())
        return len(self._own) + waiting + sum(engine.num_incidents for engine in self._engines.values())

    @calm_numpy
    def judge(self, record: StepRecord, phase: str = "all") -> Judgement:
        """Judge a record: its early rules before the step, its late ones (that need the update) after it."""
        judgement = self.engine(int(record.scalars.get("optimizer", 0))).judge(record, phase=phase)
        for incident in (*judgement.opened, *judgement.resolved):
            self.on_incident(incident)
        return judgement

    @calm_numpy
    def judge_all(self, records: Sequence[StepRecord]) -> list[Judgement]:
        """Judge complete records, oldest first."""
        numbers = {int(record.scalars.get("optimizer", 0)) for record in records}
        if len(numbers) > 1:
            return [self.judge(record) for record in records]
        judgements = self.engine(numbers.pop()).judge_all(records)
        for judgement in judgements:
            for incident in (*judgement.opened, *judgement.resolved):
                self.on_incident(incident)
        return judgements

    @calm_numpy
    def calm(self, records: int) -> float:
        """Return the global norm up to which no rule finds anything in it, in so many records from now on."""
        return min([engine.calm(records) for engine in self._engines.values()], default=0.0)

    @calm_numpy
    def alarms(self, step: int, optimizer: int = 0) -> dict[str, float]:
        """Return the global norms above which treatments of rules act at this step, by the rules' names."""
        return self.engine(optimizer).alarms(step)

    @calm_numpy
    def limits(self, optimizer: int = 0) -> dict[str, float]:
        """Return the largest global norms that rules would accept now, by the rules' names."""
        return self.engine(optimizer).limits()

    @calm_numpy
    def finish(self, step: int, scalars: Mapping[str, float]) -> None:
        """Let rules that judge a whole run speak, having told them what was learnt since the last record."""
        for engine in self._engines.values():
            for incident in engine.finish(step, scalars):
                self.on_incident(incident)

    def annotate(
        self, text: str, *, silence: int, paths: str | Sequence[str], rules: str | Sequence[str], step: int | None
    ) -> None:
        for i in {0, *self._engines}:
            self.engine(i).annotate(text, silence=silence, paths=paths, rules=rules, step=step)

    def take_failed_deciders(self) -> int:
        """Return how many rules that can change the training were disabled since the last time, because they raised."""
        failed = [rule for engine in self._engines.values() for rule in engine.take_failed()]
        return sum(map(can_decide, failed))

    def explain(self, incident: Incident, details: dict[str, Any], first_path: str | None = None) -> None:
        """Add to a going incident what was found out about it."""
        for engine in self._engines.values():
            engine.note_details(incident.name or incident.rule, details, first_path)

    def report(self, incident: Incident) -> None:
        """Add an incident of gradwatch's own, such as a treatment that failed."""
        incident = replace(incident, id=self._new_id())
        self._own.append(incident)
        self.on_incident(incident)

    @property
    def own(self) -> Sequence[Incident]:
        """Incidents of gradwatch's own, in the order in which they were reported."""
        return self._own

    def replace(self, old: Incident, new: Incident) -> None:
        """Put a told-more-of incident in place of one of gradwatch's own."""
        self._own = [new if i is old else i for i in self._own]

    def note(self, rule_name: str, treatments: Sequence[str], details: Mapping[str, Any]) -> None:
        """Add to the last incident of a rule what was done about it, and tell of it again."""
        for engine in self._engines.values():
            for incident in engine.note(rule_name, treatments, details):
                self.on_incident(incident)

    def is_troubled(self) -> bool:
        """Whether a rule that can take the training back is on its way to fire, or fires."""
        return any(engine.is_troubled for engine in self._engines.values())

    def memory(self) -> dict[int, RuleMemory]:
        """Return what the rules remember now, for each optimizer that steps on its own."""
        return {number: engine.memory() for number, engine in self._engines.items()}

    def go_back(self, memory: Mapping[int, RuleMemory], step: int) -> None:
        """Let the rules remember what they did then; incidents that go on are over at `step`."""
        for number, engine in self._engines.items():
            for incident in engine.go_back(memory.get(number), step):
                self.on_incident(incident)

    @property
    def incidents(self) -> list[Incident]:
        """All incidents so far as they stand now, in the order in which they began."""
        found = [i for engine in self._engines.values() for i in engine.incidents] + self._own
        return sorted(found, key=lambda i: i.first_step)

    @property
    def coverage(self) -> list[Any]:
        return [c for engine in self._engines.values() for c in engine.coverage()]

    def state_dict(self) -> dict[str, Any]:
        engines = {str(i): engine.state_dict() for i, engine in self._engines.items()}
        return {"engines": {**self._waiting, **engines}, "own": [i.to_json() for i in self._own]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # A state is taken up when its optimizer first steps: whether it can be is known now.
        for saved in state.get("engines", {}).values():
            RuleEngine(self.book, on_error="raise").load_state_dict(saved)
        self._own = [Incident.from_json(i) for i in state.get("own", [])]
        self._waiting = dict(state.get("engines", {}))
        for i in list(self._engines):
            waiting = self._waiting.pop(str(i), None)
            if waiting is not None:
                self._engines[i].load_state_dict(waiting)


_VETOED = "The optimizer did not move at this step. Mend what failed, or take the treatment out."


def own_incident(
    rule: str, step: int, message: str, treatments: tuple[str, ...] = (), *, is_harm: bool = True
) -> Incident:
    """Return an incident of gradwatch's own: something of it failed.

    Args:
        is_harm: it failed under treatments, and the step was vetoed.
    """
    return Incident(
        rule=rule,
        first_step=step,
        last_step=step,
        severity="critical" if is_harm else "warning",
        message=message,
        treatments=treatments,
        advice=_VETOED if is_harm else "The training went on without it. Mend what failed, or take it out.",
        resolved=True,
        resolved_step=step,
    )
