"""The rules' side of the engine: one rule engine per optimizer, their incidents together, and gradwatch's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..records import Incident, StepRecord
from ..rules import Judgement, RuleBook, RuleEngine

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
        self._on_incident = on_incident
        self._engines: dict[int, RuleEngine] = {}
        self._own: list[Incident] = []
        self._waiting: dict[str, Any] = {}

    def engine(self, optimizer: int = 0) -> RuleEngine:
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

    def judge(self, record: StepRecord, phase: str = "all") -> Judgement:
        """Judge a record: its early rules before the step, its late ones (that need the update) after it."""
        judgement = self.engine(int(record.scalars.get("optimizer", 0))).judge(record, phase=phase)
        for incident in (*judgement.opened, *judgement.resolved):
            self._on_incident(incident)
        return judgement

    def limits(self, optimizer: int = 0) -> dict[str, float]:
        """Return the largest global norms that rules would accept now, by the rules' names."""
        return self.engine(optimizer).limits()

    def finish(self, step: int, scalars: Mapping[str, float]) -> None:
        """Let rules that judge a whole run speak, having told them what was learnt since the last record."""
        for engine in self._engines.values():
            for incident in engine.finish(step, scalars):
                self._on_incident(incident)

    def annotate(self, text: str, *, silence: int, paths: str | Sequence[str], rules: str | Sequence[str]) -> None:
        for i in {0, *self._engines}:
            self.engine(i).annotate(text, silence=silence, paths=paths, rules=rules)

    def take_failed_deciders(self) -> int:
        """Return how many rules that can change the training were disabled since the last time, because they raised."""
        failed = [rule for engine in self._engines.values() for rule in engine.take_failed()]
        return sum(bool(getattr(rule, "then", ()) or getattr(rule, "stop_after", 0)) for rule in failed)

    def explain(self, incident: Incident, details: dict[str, Any], first_path: str | None = None) -> None:
        """Add to a going incident what was found out about it."""
        for engine in self._engines.values():
            engine.note_details(incident.name or incident.rule, details, first_path)

    def report(self, incident: Incident) -> None:
        """Add an incident of gradwatch's own, such as a treatment that failed."""
        incident = replace(incident, id=self._new_id())
        self._own.append(incident)
        self._on_incident(incident)

    def replace(self, old: Incident, new: Incident) -> None:
        """Put a told-more-of incident in place of one of gradwatch's own."""
        self._own = [new if i is old else i for i in self._own]

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
        self._own = [Incident.from_json(i) for i in state.get("own", [])]
        self._waiting = dict(state.get("engines", {}))
        for i in list(self._engines):
            waiting = self._waiting.pop(str(i), None)
            if waiting is not None:
                self._engines[i].load_state_dict(waiting)


def own_incident(rule: str, step: int, message: str, treatments: tuple[str, ...] = ()) -> Incident:
    """Return an incident of gradwatch's own: something of it failed under treatments, and the step was vetoed."""
    return Incident(
        rule=rule,
        first_step=step,
        last_step=step,
        severity="critical",
        message=message,
        treatments=treatments,
        advice="The optimizer did not move at this step. Mend what failed, or take the treatment out.",
        resolved=True,
        resolved_step=step,
    )
