"""A report as markdown, for pull requests and chats."""

from __future__ import annotations

import re

import numpy as np

from .._text import printable
from ..records import Verdict
from ._data import ReportData
from ._layers import layer_rows
from ._summary import Story, number, summarise

__all__ = ["to_markdown"]

PARTS = {"first": "look here first", "after": "came with it", "handled": "treated, and over", "note": "worth knowing"}


def to_markdown(data: ReportData, *, layers: int = 12) -> str:
    """Return the summary, the incidents and the layers with the largest and smallest gradients."""
    summary = summarise(data)
    lines = [f"# gradwatch: {_safe(data.name)}", "", f"**{_safe(summary.headline)}**", ""]
    lines += [f"- {_safe(fact)}" for fact in summary.facts]
    for place, story in enumerate(summary.stories, 1):
        lines += ["", f"## {place}. {_safe(story.title)}", "", *_story(story)]
    rows = layer_rows(data)
    if rows:
        most = [*rows[: layers // 2], *rows[-(layers - layers // 2) :]] if len(rows) > layers else rows
        left = f" (the {len(most)} at the ends of {len(rows)})" if len(most) < len(rows) else ""
        lines += [
            "",
            f"## Gradient norms by parameter{left}",
            "",
            "| parameter | median | largest | last |",
            "|---|---|---|---|",
        ]
        lines += [f"| `{_code(r.path)}` | {number(r.median)} | {number(r.largest)} | {number(r.last)} |" for r in most]
    lines += _coverage(summary.verdict)
    if summary.notes:
        lines += ["", "## Not seen", "", *(f"- {_safe(note)}" for note in summary.notes)]
    return "\n".join(lines) + "\n"


def _coverage(verdict: Verdict) -> list[str]:
    if not verdict.coverage:
        return []
    told = f"{len(verdict.judged)} of {len(verdict.coverage)} rules judged enough"
    lines = ["", f"## {told}", "", "| rule | over the run | times | what it would need |", "|---|---|---|---|"]
    return lines + [f"| `{_code(c.name)}` | `{c.bars}` | {c.judged} | {_safe(c.need)} |" for c in verdict.coverage]


def _story(story: Story) -> list[str]:
    lines = [
        f"*{story.severity}, {PARTS[story.part]}, rule* `{_code(story.name)}`",
        "",
        _safe(story.place),
        "",
        _safe(story.meaning),
    ]
    if story.advice:
        lines += ["", f"**What to do.** {_safe(story.advice)}"]
    if story.treated:
        lines += ["", f"**What was done.** {_safe(story.treated)}"]
    if story.case:
        lines += ["", *(f"- {head}: {_safe(text)}" for head, text in story.case)]
    if len(story.incidents) > 1:
        lines += ["", "| steps | where | value | bar |", "|---|---|---|---|"]
        for i in story.incidents[:20]:
            where = f"`{_code(i.first_path)}`" if i.first_path else "whole model"
            value = number(i.value) if not np.isnan(i.value) or i.rule == "non_finite" else ""
            value += f" in `{_code(i.worst_elsewhere)}`" if value and i.worst_elsewhere else ""
            limit = "" if np.isnan(i.limit) else number(i.limit)
            lines.append(f"| {i.first_step} to {i.last_step} | {where} | {value} | {limit} |")
    return lines


def _safe(text: str) -> str:
    """Return text of which no reader of markdown makes more than text: no HTML, no link, no table, no escape."""
    flat = printable(" ".join(text.split()))
    return re.sub(r"([\\`*_\[\]()|#!~])", r"\\\1", flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _code(text: str) -> str:
    """Return text to stand between backquotes; readers of markdown that know none find no HTML and no link in it."""
    flat = printable(" ".join(text.split())).replace("`", "'").replace("|", "\\|")
    return flat.replace("<", "‹").replace(">", "›").replace("](", "] (")
