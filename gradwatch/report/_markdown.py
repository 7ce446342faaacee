"""A report as markdown, for pull requests and chats."""

from __future__ import annotations

import re

import numpy as np

from ._data import ReportData
from ._layers import layer_rows
from ._summary import Story, number, summarise

__all__ = ["to_markdown"]

PARTS = {"first": "look here first", "after": "came with it", "note": "worth knowing"}


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
    if summary.notes:
        lines += ["", "## Not seen", "", *(f"- {_safe(note)}" for note in summary.notes)]
    return "\n".join(lines) + "\n"


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
    if len(story.incidents) > 1:
        lines += ["", "| steps | where | value | limit |", "|---|---|---|---|"]
        for i in story.incidents[:20]:
            where = f"`{_code(i.first_path)}`" if i.first_path else "whole model"
            value = number(i.value) if not np.isnan(i.value) or i.rule == "non_finite" else ""
            limit = "" if np.isnan(i.limit) else number(i.limit)
            lines.append(f"| {i.first_step} to {i.last_step} | {where} | {value} | {limit} |")
    return lines


def _safe(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'").replace("|", "\\|")
