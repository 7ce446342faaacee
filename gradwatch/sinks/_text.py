"""Incidents in words, as markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .._text import printable
from ..records import SEVERITIES, Incident
from ._headline import Headline

__all__ = ["closing_words", "escape", "fenced", "incident_line"]


def escape(words: str) -> str:
    """Return the words with what markdown or HTML would take for its own made harmless."""
    flat = printable(" ".join(words.split()), keep="")
    inert = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#|!~])", r"\\\1", inert)


def fenced(words: str) -> str:
    """Return the words as a block of code, which shows columns under each other and interprets nothing."""
    return "```\n" + printable(words).replace("```", "'''") + "\n```"


def incident_line(incident: Incident) -> str:
    """Return one line of markdown that says what was seen, or that it is over."""
    what = escape(str(incident))
    if incident.resolved:
        return f"{what}: over since step {incident.resolved_step}"
    return f"**{what}**" + (f" {escape(incident.advice)}" if incident.advice else "")


def closing_words(headline: Headline, incidents: Sequence[Incident], step: int) -> str:
    """Return the summary that stands at the end of a run, in markdown."""
    lines = [
        "### gradwatch",
        "",
        f"{headline.count} steps up to step {step}, {headline.num_treated} treated, {headline.num_skipped} skipped.",
        "",
    ]
    if not incidents:
        return "\n".join([*lines, "No incidents."])
    lines += [
        "| step | severity | what | where | value | limit | treated by | state |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ranks = {s: i for i, s in enumerate(SEVERITIES)}
    for i in sorted(incidents, key=lambda i: (-ranks.get(i.severity, 0), i.first_step)):
        where = escape(i.first_path or "whole model") + (f" (+{len(i.paths) - 1})" if len(i.paths) > 1 else "")
        state = f"over since {i.resolved_step}" if i.resolved else f"goes on at {i.last_step}"
        cells = [
            str(i.first_step),
            i.severity,
            escape(i.name or i.rule),
            where,
            f"{i.value:.3g}" + (f" in {escape(i.worst_elsewhere)}" if i.worst_elsewhere else ""),
            f"{i.limit:.3g}",
            escape(", ".join(i.done)),
            state,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    advice = dict.fromkeys((escape(i.name or i.rule), escape(i.advice)) for i in incidents if i.advice)
    return "\n".join([*lines, "", *(f"- **{name}**: {words}" for name, words in advice)])
