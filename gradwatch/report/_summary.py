"""The words on top of a report: is it healthy, what came first, what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .._markup import Prints, card, escape, number, table
from ..records import HEALTHY, NOT_ENOUGH_SEEN, SEVERITIES, Incident, Verdict, cost_of_steps, judge_run, rank_incidents
from ._data import ReportData
from ._words import explain

__all__ = ["Story", "Summary", "number", "summarise", "verdict_of"]


@dataclass(frozen=True, kw_only=True)
class Story:
    """All incidents of one rule.

    Attributes:
        rule, name: of the rule.
        severity: the worst.
        title, meaning: what happened and why it matters.
        place: when and where, as a sentence.
        part: what it is to the others: "first", "after", "handled" (before them, and over), "note".
        advice: what to do.
        treated: what was done about it, as a sentence, or "".
        incidents: in order of their first step.
        case: what the case file of the first of them says: headings and sentences; () where there is none.
    """

    rule: str
    name: str
    severity: str
    title: str
    meaning: str
    place: str
    part: str
    advice: str
    treated: str
    incidents: tuple[Incident, ...]
    case: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Summary(Prints):
    """Attributes:
    verdict: the words all doors share.
    state: how it is shown: "healthy", "noted" (healthy, with something to know), "unseen", "warning" or "critical".
    headline: one sentence.
    facts: sentences about the run as a whole: length, treatments, cost.
    stories: the likely cause first.
    notes: what was not seen.
    """

    verdict: Verdict
    state: str
    headline: str
    facts: tuple[str, ...]
    stories: tuple[Story, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        told = [f"{place}. {story.title}: {story.place}" for place, story in enumerate(self.stories, 1)]
        return "\n".join([self.headline, *self.facts, *told, *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        rows = [(f"<b>{escape(story.title)}</b>", escape(story.place)) for story in self.stories]
        facts = "".join(f"<div>{escape(fact)}</div>" for fact in (*self.facts, *self.notes))
        return card(self.headline, self.verdict.tone, facts + (table(("", ""), rows) if rows else ""))


def summarise(data: ReportData) -> Summary:
    """Return the summary of a run.

    Stories stand in the order of causes that all doors share (`rank_incidents`). What is only worth knowing (`info`)
    comes last.
    """
    groups: dict[str, list[Incident]] = {}
    for incident, _ in rank_incidents(data.incidents):
        groups.setdefault(incident.name or incident.rule, []).append(incident)
    ordered = sorted(groups.values(), key=_is_note)
    verdict = verdict_of(data)
    first = next((i for i, group in enumerate(ordered) if any(_key(one) == verdict.first for one in group)), 0)
    stories = tuple(_story(group, _part(i - first, group)) for i, group in enumerate(ordered))
    return Summary(
        verdict=verdict,
        state=_state(verdict, stories),
        headline=_headline(verdict, stories),
        facts=tuple(_facts(data)),
        stories=stories,
        notes=tuple(data.notes),
    )


def verdict_of(data: ReportData) -> Verdict:
    """Return the verdict on the run; where nobody has told what its rules judged, that not enough was seen."""
    if data.verdict is not None:
        return data.verdict
    return judge_run(incidents=data.incidents, coverage=None, num_steps=data.num_steps)


def _rank(severity: str) -> int:
    return SEVERITIES.index(severity) if severity in SEVERITIES else 1


def _is_note(group: Sequence[Incident]) -> bool:
    return max(_rank(i.severity) for i in group) == 0


def _part(place: int, group: Sequence[Incident]) -> str:
    if _is_note(group):
        return "note"
    if place < 0:
        return "handled"
    return "first" if place == 0 else "after"


def _key(incident: Incident) -> tuple[str, int, int]:
    return incident.rule, incident.first_step, incident.id


def _state(verdict: Verdict, stories: Sequence[Story]) -> str:
    if verdict.state == NOT_ENOUGH_SEEN:
        return "unseen"
    if verdict.state == HEALTHY:
        return "noted" if stories else "healthy"
    return "critical" if any(s.severity == "critical" for s in stories) else "warning"


def _headline(verdict: Verdict, stories: Sequence[Story]) -> str:
    only_notes = bool(stories) and all(s.part == "note" for s in stories)
    if verdict.state == NOT_ENOUGH_SEEN or (verdict.state == HEALTHY and not only_notes):
        return verdict.headline
    first = next((s for s in stories if s.part == "first"), stories[0])
    title = first.title[0].lower() + first.title[1:]
    if verdict.state == HEALTHY:
        return f"Healthy, with something to know: {title}."
    return f"Not healthy since step {verdict.since:,}. The likely cause: {title}."


def _story(group: Sequence[Incident], part: str) -> Story:
    incidents = tuple(sorted(group, key=lambda i: (i.first_step, i.id)))
    first = incidents[0]
    worst = max(incidents, key=lambda i: _rank(i.severity))
    said = explain(first.rule, first.name)
    treatments = dict.fromkeys(t for i in incidents for t in i.treatments)
    words = dict.fromkeys(w for i in incidents for t, w in zip(i.treatments, i.done, strict=True) if w != t)
    more = f": {_join(list(words))}" if words else ""
    return Story(
        rule=first.rule,
        name=first.name or first.rule,
        severity=worst.severity,
        title=said.title,
        meaning=said.meaning,
        place=_place(incidents),
        part=part,
        advice=first.advice,
        treated=f"gradwatch ran {_join(list(treatments))} for it{more}." if treatments else "",
        incidents=incidents,
        case=tuple(next((i.case.lines() for i in incidents if i.case is not None), ())),
    )


def _place(incidents: Sequence[Incident]) -> str:
    first = incidents[0]
    paths = list(dict.fromkeys(p for i in incidents for p in i.paths if p))
    where = first.first_path or (paths[0] if paths else "")
    others = len([p for p in paths if p != where])
    place = f"in {where}" if where else "in the network as a whole"
    if others:
        place += f" and {others} other {'path' if others == 1 else 'paths'}"
    if len(incidents) > 1:
        when = (
            f"{len(incidents)} times between step {first.first_step:,} and step {max(i.last_step for i in incidents):,}"
        )
    elif first.last_step > first.first_step:
        when = f"From step {first.first_step:,} to step {first.last_step:,}"
    else:
        when = f"At step {first.first_step:,}"
    seen = f": {first.seen.rstrip('.')}" if first.message else ""
    return f"{when}, {place}{seen}. {_end(incidents)}"


def _end(incidents: Sequence[Incident]) -> str:
    if not all(i.resolved for i in incidents):
        return "It was still so at the last step seen."
    at, over = incidents[0].details.get("treated_at"), incidents[0].resolved_step
    if len(incidents) == 1 and isinstance(at, int) and over is not None and incidents[0].treatments:
        return f"It was treated at step {at:,}, and over at step {over:,}."
    return "It is over."


def _facts(data: ReportData) -> list[str]:
    facts = []
    if data.num_steps:
        model = f"{data.meta['model']}: " if data.meta.get("model") else ""
        parameters = int(data.index.numel[data.index.is_parameter].sum())
        what = f"{int(data.index.is_parameter.sum()):,} parameter tensors with {parameters:,} numbers"
        facts.append(f"{model}{_times(data.num_steps)} recorded, {data.first_step:,} to {data.last_step:,}; {what}.")
    for t in data.treatments:
        behind = f" behind the rule {t.rule}" if t.rule else ""
        least = f"; at the strongest {100 * t.least_share:.3g} % of the norm were left" if t.least_share < 1 else ""
        facts.append(
            f"{t.name}{behind} changed {_times(t.count)} (first {t.first_step:,}, last {t.last_step:,}){least}."
        )
    if not data.treatments and data.num_steps:
        facts.append("No gradient was changed: gradwatch only watched.")
    if data.num_skipped:
        facts.append(f"At {_times(data.num_skipped)} the optimizer was kept from moving anything.")
    if math.isfinite(data.overhead_seconds):
        facts.append(_cost(data))
    return facts


def _cost(data: ReportData) -> str:
    in_all = f"; {_seconds(data.overhead_seconds)} in all"
    if {"time", "overhead_seconds"} <= data.scalars.keys():
        steps, times = data.scalars["time"]
        spent = dict(zip(*(column.tolist() for column in data.scalars["overhead_seconds"]), strict=True))
        cost = cost_of_steps(steps, times, np.asarray([spent.get(step, math.nan) for step in steps.tolist()]))
        return f"gradwatch itself: {cost}{in_all}." if cost else f"gradwatch itself: {in_all[2:]}."
    num_steps = max(data.num_steps, 1)
    own = data.overhead_seconds / num_steps
    whole = f", of {_seconds(data.total_seconds / num_steps)}" if data.total_seconds > 0 else ""
    return f"gradwatch itself: {_seconds(own)} a step{whole}{in_all}."


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2g} ms" if seconds < 0.1 else f"{seconds:.3g} s"


def _times(count: int) -> str:
    return f"{count:,} {'step' if count == 1 else 'steps'}"


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
