"""One HTML file that needs nothing else: words, data, scripts and styles, behind a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorboard_plugin_gradwatch import MISSING, STATIC, pool

from .._markup import escape
from .._text import replay_command
from ..records import (
    MODULE,
    PARAMETER,
    Column,
    Floats,
    Incident,
    Verdict,
    columns,
    own_columns,
    rank_incidents,
    told_columns,
)
from ._bundle import bundle, styles
from ._data import COLUMNS, ReportData, Table
from ._quantise import encode_histograms, encode_tables, squeeze
from ._summary import Story, Summary, summarise, verdict_of
from ._svg import static_picture

__all__ = ["LIMIT", "to_html"]

LIMIT = 490_000
"""Bytes of the whole file at most, as far as pooling can keep it."""

MANY = 600
"""Parameters above which biases are left out of the pictures."""

CURVES = ("loss", "global_norm", "global_norm_after", "global_norm_applied", "limit", "clip_limit")

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<!-- Curves are drawn by uPlot.
{licence}
-->
{words}
<div id="app"></div>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def to_html(data: ReportData | Sequence[ReportData], *, limit: int = LIMIT) -> str:
    """Return a report of one run, or of several over each other, as one file of at most about `limit` bytes a run; long
    runs are pooled to fit.

    The policy is `default-src 'none'`: the page can ask for nothing, and only the two inline blocks whose hashes it
    names take effect. Names out of the run go in as text.
    """
    runs = _named_apart([data] if isinstance(data, ReportData) else data)
    script, style = bundle("report.js"), styles()
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    )
    words = "".join(_words(run, summarise(run), place, len(runs)) for place, run in enumerate(runs))
    licence = (STATIC / "vendor" / "LICENSE-uPlot").read_text(encoding="utf-8").strip()
    room = limit * len(runs) - sum(len(part.encode()) for part in (PAGE, script, style, words, licence))
    payloads = [_payload(run, max(20_000, room // len(runs))) for run in runs]
    return PAGE.format(
        policy=policy,
        title=escape(f"gradwatch: {', '.join(run.name for run in runs)}"),
        style=style,
        script=script,
        words=words,
        licence=licence.replace("--", "- -"),
        data=_inert(payloads[0] if len(payloads) == 1 else {"runs": payloads}),
    )


def _named_apart(runs: Sequence[ReportData]) -> list[ReportData]:
    """Return the runs with names that differ: the page asks for each by its name."""
    names: list[str] = []
    for run in runs:
        name, number = run.name, 1
        while name in names:
            number += 1
            name = f"{run.name} ({number})"
        names.append(name)
    return [run if run.name == name else replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inert(payload: Mapping[str, Any]) -> str:
    """Return JSON in which nothing can end the element it stands in."""
    text = json.dumps(payload, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _payload(data: ReportData, room: int) -> dict[str, Any]:
    fixed: dict[str, Any] = {
        "name": data.name,
        "index": squeeze(json.dumps(data.index.to_json()).encode()),
        "meta": {"model": str(data.meta.get("model", ""))},
        "incidents": [
            {**i.to_json(), "treatments": list(i.done), "labels": {}, "details": {}, "case": _case_lines(i)}
            for i, _ in rank_incidents(data.incidents)
        ],
        "scalars": _scalars(data),
        "verdict": verdict_of(data).to_json() | {"coverage": []},
    }
    room -= len(_inert(fixed)) + 4000
    told = list(dict.fromkeys(p for i in data.incidents for p in (i.first_path, *i.paths[:5])))
    histograms = encode_histograms(data.histograms, told, int(0.15 * room))
    room -= len(_inert(histograms))
    own = told_columns(data.meta)
    own |= {column.name: column for column in own_columns()}
    names = _shown(data, own)
    over = {name: _over(data, data.tables[name]) for name in names}
    rows = {name: _rows(data, over[name], told) for name in names}
    names = [name for name in names if len(rows[name])]
    tables = encode_tables(
        [(name, data.tables[name], rows[name]) for name in names], room - 5 * COLUMNS - 400 * len(names)
    )
    for name in names:
        whole = _rows(data, over[name], None)
        tables[name]["over"] = over[name]
        if name in own:
            tables[name]["about"] = own[name].to_json()
        tables[name]["places"] = None if len(whole) == len(rows[name]) else np.searchsorted(whole, rows[name]).tolist()
    return {**fixed, "histograms": histograms, "tables": tables}


def _case_lines(incident: Incident) -> list[tuple[str, str]]:
    return [] if incident.case is None else incident.case.lines()


def _shown(data: ReportData, own: Mapping[str, Column]) -> list[str]:
    """Return the tables of a report: in the order of the table of columns, then others; none that it leaves out."""
    told = {c.name: c for c in (*columns(PARAMETER, MODULE, own=False), *own.values())}
    names = [*(n for n in told if n in data.tables), *sorted(set(data.tables) - told.keys())]
    return [n for n in names if n not in told or told[n].in_report]


def _over(data: ReportData, table: Table) -> str:
    """Return what a table measures: `"parameter"`, `"module"` or `"all"`."""
    measured = (table.values != MISSING).any(axis=0)
    if not (measured & data.index.is_module).any():
        return PARAMETER
    return MODULE if not (measured & data.index.is_parameter).any() else "all"


def _rows(data: ReportData, over: str, told: Sequence[str] | None) -> NDArray[np.int64]:
    """Return the places in the index of a table's rows. Where there are very many, and `told` is given, of
    one-dimensional parameters (biases, which the page hides) only those that incidents name."""
    index = data.index
    chosen = {PARAMETER: index.is_parameter, MODULE: index.is_module}.get(over, np.ones(len(index), np.bool_))
    if told is not None and int(index.is_parameter.sum()) > MANY and (index.ndim > 1).any():
        named = np.isin(np.asarray(index.paths, dtype=object), list(told))
        chosen = chosen & (index.is_module | (index.ndim > 1) | named)
    return np.flatnonzero(chosen)


def _scalars(data: ReportData) -> dict[str, Any]:
    """Return the curves of the page on common steps: the largest where steps are pooled, of cosines the smallest."""
    names = [n for n in data.scalars if n in CURVES or n.startswith("task_cos/")]
    steps = np.unique(np.concatenate([data.scalars[n][0] for n in names])) if names else np.zeros(0)
    columns: list[Floats] = []
    for name in names:
        when, values = data.scalars[name]
        column = np.full(len(steps), MISSING)
        column[np.searchsorted(steps, when)] = np.where(np.isneginf(values), np.inf, values)
        columns.append(column)
    matrix = np.stack(columns, axis=1).astype(np.float32) if columns else np.zeros((0, 0), np.float32)
    signs = np.array([-1.0 if n.startswith("task_cos/") else 1.0 for n in names], np.float32)
    measured = matrix != MISSING
    pooled_steps, pooled = pool(steps, np.where(measured, matrix * signs, MISSING), COLUMNS)
    pooled = np.where(pooled != MISSING, pooled * signs, MISSING)
    return {
        "names": names,
        "steps": pooled_steps.astype(np.int64).tolist(),
        "data": squeeze(np.ascontiguousarray(pooled.T, "<f4").tobytes()),
    }


def _words(data: ReportData, summary: Summary, place: int = 0, count: int = 1) -> str:
    """Return the summary as HTML. Every text is escaped here and nowhere else.

    Args:
        place, count: of the run among those of the page.
    """
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in summary.facts)
    stories = "".join(_story(story, place) for story in summary.stories)
    button = '<button type="button" id="theme" hidden>light or dark</button>' if place == 0 else ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in summary.notes)
    return (
        f'<header class="gw-report gw-state-{summary.state}">'
        f'<div class="gw-top"><span class="gw-brand">gradwatch</span><h1>{escape(data.name)}</h1>'
        f"{button}</div>"
        f'<p class="gw-headline">{escape(summary.headline)}</p>'
        f"{stories}"
        f'<ul class="gw-facts">{facts}</ul>'
        f"{_coverage(summary.verdict)}"
        + (f'<h2>Not seen</h2><ul class="gw-facts">{notes}</ul>' if notes else "")
        + _replay(data)
        + "</header>"
        + f'<div class="gw-static">{static_picture(data)}</div>'
    )


def _replay(data: ReportData) -> str:
    if not data.folder or not data.incidents:
        return ""
    command = escape(replay_command(data.folder))
    return f'<p class="gw-quiet">What other rules would have said of it: <code>{command}</code></p>'


def _coverage(verdict: Verdict) -> str:
    """Return what each rule judged, with a strip over the run, as a table that opens; "" where that is not known."""
    if not verdict.coverage:
        return ""
    rows = "".join(
        f"<tr><td>{escape(c.name)}</td><td><code>{escape(c.bars)}</code></td>"
        f'<td class="gw-num">{c.judged:,}</td><td>{escape(c.need)}</td></tr>'
        for c in verdict.coverage
    )
    heads = "".join(f"<th>{head}</th>" for head in ("rule", "judged over the run", "times", "what it would need"))
    told = f"{len(verdict.judged)} of {len(verdict.coverage)} rules judged enough"
    return (
        f'<details class="gw-coverage"><summary>{told}</summary><div class="gw-scroll"><table class="gw-table">'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


PARTS = {
    "first": "Look here first",
    "after": "Came with it, and may be its consequence",
    "handled": "Treated, and over",
    "note": "Worth knowing",
}


def _marked(text: str) -> str:
    """Return escaped text, `code` in backquotes set as such."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _case(story: Story) -> str:
    if not story.case:
        return ""
    rows = "".join(f"<dt>{escape(head)}</dt><dd>{escape(text)}</dd>" for head, text in story.case)
    return f'<details class="gw-case"><summary>The case file</summary><dl>{rows}</dl></details>'


def _story(story: Story, place: int) -> str:
    lines = [
        f'<p class="gw-place">{escape(story.place)}</p>',
        f"<p><b>What it means.</b> {escape(story.meaning)}</p>",
        f"<p><b>What to do.</b> {_marked(story.advice)}</p>" if story.advice else "",
        f"<p><b>What was done.</b> {escape(story.treated)}</p>" if story.treated else "",
        _case(story),
    ]
    first = story.incidents[0]
    return (
        f'<section class="gw-story gw-{escape(story.severity)}" data-incident="{int(first.id)}"'
        f' data-rule="{escape(story.rule)}" data-step="{int(first.first_step)}" data-run="{place}">'
        f'<h2><span class="gw-part">{PARTS[story.part]}</span>'
        f" {escape(story.title)} <code>{escape(story.name)}</code></h2>"
        f"{''.join(lines)}</section>"
    )
