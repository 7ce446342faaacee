"""Is a run healthy? One of three answers, from what its rules judged and said; every door gives this one.

Nothing seen is not nothing wrong: a run is healthy only where rules judged enough of it and it came to its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._markup import Prints, card, escape, table
from ._causes import rank_incidents
from ._incident import SEVERITIES, Incident

__all__ = [
    "ENDED_WELL",
    "GOING_ON",
    "HEALTHY",
    "MIN_STEPS",
    "NOT_ENOUGH_SEEN",
    "NOT_HEALTHY",
    "RuleCoverage",
    "Verdict",
    "judge_run",
    "merged",
]

HEALTHY, NOT_HEALTHY, NOT_ENOUGH_SEEN = "healthy", "not healthy", "not enough seen"

MIN_STEPS = 50
"""Steps on record below which nothing is said to be healthy: most of what goes wrong goes wrong later."""

ENDED_WELL, GOING_ON = "complete", "running"

LISTED = 6
"""Rules and incidents that one line names; what is beyond is counted."""

ASKING = frozenset({"notify", "checkpoint", "stop"})
"""Actions that change nothing about what went wrong."""

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class RuleCoverage:
    """Whether a rule was evaluated at all, and if not, why.

    Attributes:
        name: of the rule.
        judged: records it judged.
        reason: why it did not judge the last record it passed over; "" where it judged all. Of a rule that failed: what
            it raised.
        disabled: it raised and was switched off.
        seen: records it was shown.
        enough: judgements after which it has seen enough to say that all is well.
        is_core: it judges what every training has: losses and gradients.
        strip: the share of the records that it judged, over equal parts of the run, from 0 to 1. Where records are
            judged in blocks it is so to within a block; two that differ in it alone are equal.
    """

    name: str
    judged: int
    reason: str = ""
    disabled: bool = False
    seen: int = 0
    enough: int = 1
    is_core: bool = True
    strip: tuple[float, ...] = field(default=(), compare=False)

    @property
    def is_enough(self) -> bool:
        """It works, and judged as often as it must."""
        return not self.disabled and self.judged >= max(self.enough, 1)

    @property
    def need(self) -> str:
        """What it would take, in a few words; "" where it judged enough."""
        if self.disabled:
            return f"failed: {self.reason}" if self.reason else "failed"
        if self.is_enough:
            return ""
        if self.judged:
            times = "once" if self.judged == 1 else f"{self.judged:,} times"
            return f"judged {times}, {self.enough:,} are needed"
        return self.reason or "never judged"

    @property
    def bars(self) -> str:
        """The strip as text: a bar for each part of the run, a dot where nothing was judged."""
        return "".join("·" if not share > 0 else BARS[min(int(share * 8), 7)] for share in self.strip)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**{f: getattr(self, f) for f in self.__dataclass_fields__}, "strip": [round(s, 3) for s in self.strip]}

    @classmethod
    def from_json(cls, data: Any) -> RuleCoverage | None:
        """Return what `to_json` gave; None for anything else."""
        if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
            return None
        try:
            return cls(
                name=data["name"],
                judged=int(data.get("judged", 0)),
                reason=str(data.get("reason", "")),
                disabled=data.get("disabled") is True,
                seen=int(data.get("seen", 0)),
                enough=int(data.get("enough", 1)),
                is_core=data.get("is_core") is not False,
                strip=tuple(min(max(float(s), 0.0), 1.0) for s in list(data.get("strip", ()))[:256]),
            )
        except (TypeError, ValueError, OverflowError):
            return None


def merged(coverage: Iterable[RuleCoverage]) -> tuple[RuleCoverage, ...]:
    """Return one entry per rule. Where optimizers are judged apart, the one of which least was seen speaks."""
    found: dict[str, RuleCoverage] = {}
    for entry in coverage:
        other = found.get(entry.name)
        if other is None or (entry.disabled, -entry.judged) > (other.disabled, -other.judged):
            found[entry.name] = entry
    return tuple(found.values())


@dataclass(frozen=True, kw_only=True)
class Verdict(Prints):
    """What can be said of a run. Prints as its headline.

    Attributes:
        state: `"healthy"`, `"not healthy"`, `"not enough seen"`.
        headline: one sentence.
        reasons: why not enough was seen, a sentence each; () where it was.
        judged: names of the rules that judged enough.
        unjudged: rule -> what it would need, of those that could not, or not enough.
        coverage: of every rule.
        num_steps: on record.
        first: rule, first step and id of the incident to look at first; None where there is none.
        since: the step from which on it is not healthy; -1 where it is not unhealthy.
    """

    state: str
    headline: str
    reasons: tuple[str, ...] = ()
    judged: tuple[str, ...] = ()
    unjudged: Mapping[str, str] = field(default_factory=dict)
    coverage: tuple[RuleCoverage, ...] = ()
    num_steps: int = 0
    first: tuple[str, int, int] | None = None
    since: int = -1

    def __str__(self) -> str:
        return self.headline

    def lines(self) -> list[str]:
        """Return the headline, and what it rests on, one line each."""
        lines = [self.headline]
        if self.judged:
            lines.append(f"judged enough: {_listed(self.judged, 40)}")
        if self.unjudged:
            told = [f"{name} ({need})" for name, need in self.unjudged.items()]
            lines.append(f"could not judge: {_listed(told, 40)}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "state": self.state,
            "tone": self.tone,
            "headline": self.headline,
            "reasons": list(self.reasons),
            "judged": list(self.judged),
            "unjudged": dict(self.unjudged),
            "num_steps": self.num_steps,
            "first": None if self.first is None else list(self.first),
            "since": self.since,
            "coverage": [entry.to_json() for entry in self.coverage],
        }

    def _repr_html_(self) -> str:
        return card(self.headline, self.tone, self.judged_html())

    def judged_html(self) -> str:
        """Return a strip for every rule, as a table that opens; "" where nobody told of any."""
        rows = [
            (escape(c.name), f"<code>{escape(c.bars)}</code>", f"{c.judged:,} of {c.seen:,}", escape(c.need))
            for c in self.coverage
        ]
        judged = table(("rule", "judged over the run", "times", "what it would need"), rows)
        return f"<details><summary>what each rule judged</summary>{judged}</details>" if rows else ""

    @property
    def tone(self) -> str:
        """The word that pages colour it by: "good", "bad" or "unseen"."""
        return {HEALTHY: "good", NOT_HEALTHY: "bad"}.get(self.state, "unseen")


def judge_run(
    *,
    incidents: Sequence[Incident] = (),
    coverage: Iterable[RuleCoverage] | None = (),
    num_steps: int = 0,
    ended: str = ENDED_WELL,
    how: str = "",
) -> Verdict:
    """Return the verdict on a run.

    Args:
        incidents: all of them, as they stand.
        coverage: what each rule judged; None where that is not on record.
        num_steps: steps on record.
        ended: `"complete"`; `"running"`: it is not over; anything else is how it ended instead.
        how: the same in words, where there are better ones.
    """
    rules = merged(coverage or ())
    bad = [i for i in incidents if _rank(i) > 0]
    left = [i for i in bad if not _is_handled(i)]
    judged = tuple(c.name for c in rules if c.is_enough)
    unjudged = {c.name: c.need for c in rules if not c.is_enough}
    reasons = _missing(rules, coverage is None, num_steps, ended, how)
    leading, since = _leading(left or bad or incidents), -1
    if left:
        leading = _root(left, bad)
        since = min(i.first_step for i in (leading, *left))
        state, headline = NOT_HEALTHY, _ill(leading, since, left, bad)
    elif reasons:
        state, headline = NOT_ENOUGH_SEEN, _unseen(reasons, bad, num_steps)
    else:
        state, headline = HEALTHY, _well(rules, bad, num_steps, ended, is_quiet=not incidents)
    return Verdict(
        state=state,
        headline=headline,
        reasons=reasons,
        judged=judged,
        unjudged=unjudged,
        coverage=rules,
        num_steps=num_steps,
        first=None if leading is None else (leading.rule, leading.first_step, leading.id),
        since=since,
    )


def _rank(incident: Incident) -> int:
    return SEVERITIES.index(incident.severity) if incident.severity in SEVERITIES else 1


def _leading(incidents: Sequence[Incident]) -> Incident | None:
    """Return the one to look at first."""
    ranked = rank_incidents(incidents)
    return ranked[0].incident if ranked else None


def _root(left: Sequence[Incident], bad: Sequence[Incident]) -> Incident:
    """Return what the first of those left follows from, be it handled, or that one itself."""
    kept = set(map(id, left))
    return next(r.cause or r.incident for r in rank_incidents(bad) if id(r.incident) in kept)


def _is_handled(incident: Incident) -> bool:
    """It is over, and something was done about it. Not gradwatch's own (a treatment that failed): over as it begins."""
    over = incident.resolved and incident.resolved_step is not None and incident.resolved_step > incident.first_step
    return over and bool(set(incident.treatments) - ASKING)


def _missing(rules: Sequence[RuleCoverage], is_unknown: bool, num_steps: int, ended: str, how: str) -> tuple[str, ...]:
    """Return why nothing can be said to be well, the weightiest reason first."""
    reasons = []
    if not num_steps:
        reasons.append("nothing was recorded")
    if ended not in (ENDED_WELL, GOING_ON):
        reasons.append(how or ended)
    failed = [c for c in rules if c.disabled]
    if failed:
        told = _listed([f"{c.name} ({c.reason})" if c.reason else c.name for c in failed])
        reasons.append(f"{'rules' if len(failed) > 1 else 'a rule'} failed: {told}")
    if is_unknown:
        if num_steps:
            over = ended != GOING_ON
            reasons.append("which rules judged it is not on record" if over else "it is not over")
        return tuple(reasons)
    if not rules:
        # Of a run without a step nobody knows: rules are asked step by step.
        reasons += ["no rule was asked to judge"] if num_steps else []
        return tuple(reasons)
    if 0 < num_steps < MIN_STEPS:
        reasons.append(f"{num_steps} {'steps' if num_steps > 1 else 'step'} on record, {MIN_STEPS} are the least")
    asked = [c for c in rules if c.is_core] or list(rules)
    short = [c for c in asked if not c.is_enough and not c.disabled]
    if short and num_steps:
        told = _listed([f"{c.name} ({c.need})" for c in short])
        reasons.append(f"{'rules' if len(short) > 1 else 'a rule'} could not judge enough: {told}")
    return tuple(reasons)


def _listed(words: Sequence[str], most: int = LISTED) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def _count(number: int) -> str:
    return "one incident" if number == 1 else f"{number:,} incidents"


def _ill(first: Incident, since: int, left: Sequence[Incident], bad: Sequence[Incident]) -> str:
    where = f" in {first.first_path}" if first.first_path else ""
    more = f", {len(bad) - 1} more after or beside it" if len(bad) > 1 else ""
    # Of a cause that was handled, and what follows from it was not: which of them was left.
    names = list(dict.fromkeys(i.name or i.rule for i in left))
    is_left = any(i is first for i in left)
    what = "it" if is_left else _listed(names)
    over = "" if is_left else f"; nothing was done about {what}"
    if all(i.resolved for i in left):
        last = max((i.resolved_step if i.resolved_step is not None else i.last_step) for i in left)
        over = f"; over at {last:,}, and nothing was done about {what}"
    return f"Not healthy since step {since:,}: {first.name or first.rule}{where}{more}{over}."


def _unseen(reasons: Sequence[str], handled: Sequence[Incident], num_steps: int) -> str:
    told = "; ".join(reasons)
    beside = f" On record: {_handled(handled)}." if handled else ""
    if not handled and num_steps:
        beside = " No incident is on record."
    return f"Not enough seen: {told}.{beside}"


def _well(
    rules: Sequence[RuleCoverage], handled: Sequence[Incident], num_steps: int, ended: str, *, is_quiet: bool
) -> str:
    so_far = " so far" if ended == GOING_ON else ""
    if handled:
        return f"Healthy{so_far}: {_handled(handled)}."
    enough = sum(c.is_enough for c in rules)
    what = "one rule" if enough == 1 else f"{enough} rules"
    return f"Healthy{so_far}: {what} judged {num_steps:,} steps, and none {'fired' if is_quiet else 'gave an alarm'}."


def _handled(incidents: Sequence[Incident]) -> str:
    """Return the story of incidents that something was done about, the first few one by one."""
    ordered = sorted(incidents, key=lambda i: i.first_step)
    if len(ordered) == 1:
        return f"one incident, {_story(ordered[0])}"
    told = [f"{i.name or i.rule} {_story(i)}" for i in ordered]
    return f"{_count(len(ordered))}, all treated and over: {_listed(told, 3)}"


def _story(incident: Incident) -> str:
    at = incident.details.get("treated_at")
    treated = f"treated at {at:,}" if isinstance(at, int) and not isinstance(at, bool) else "treated"
    return f"{treated}, over at {incident.resolved_step:,}"
