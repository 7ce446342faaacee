"""The pictures of a report as they stand: for paper, and for readers without scripts. Norms and heatmap, with a legend.

Shapes: T steps, N paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape as escape_html
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorboard_plugin_gradwatch import MISSING, pool

from .._text import printable
from ..notebook import lies_on
from ..records import Floats
from ._data import ReportData

__all__ = ["static_picture"]

WIDTH, GUTTER, CURVE, GAP = 880, 190, 110, 26
MAX_COLUMNS, MAX_ROWS = 120, 40
LEVELS = 12
VIRIDIS = (
    *("440154", "482475", "414487", "355f8d", "2a788e", "21918c"),
    *("22a884", "44bf70", "7ad151", "bddf26", "d8e219", "fde725"),
)
MISSING_COLOR, ZERO_COLOR, BAD_COLOR = "e4e4e8", "969696", "e5002e"


class Curve(NamedTuple):
    """A scalar's line; `apart_from`: drawn where it leaves that one alone, which it would hide."""

    name: str
    label: str
    color: str
    dashes: str = ""
    apart_from: str = ""


LOSS = (Curve("loss", "loss", "1f6fc4"),)
NORMS = (
    Curve("global_norm", "global norm", "1f6fc4"),
    Curve("global_norm_after", "after treatment", "e07b00", apart_from="global_norm"),
    Curve("global_norm_applied", "as the optimizer got it", "1a9c6b", apart_from="global_norm_after"),
    Curve("limit", "the alarm’s bar", "cf0029", "6 4"),
    Curve("clip_limit", "a clip’s limit", "1f2328", "2 3"),
)
"""In the colours of the page's own norms."""
SEVERITIES = {"critical": "cf0029", "warning": "b25e00", "info": "1f6fc4"}


def static_picture(data: ReportData) -> str:
    """Return an SVG element with the loss, the norms, the heatmap and their legend; "" where nothing was recorded."""
    if not data.num_steps:
        return ""
    parts: list[str] = []
    top = 14
    for curves in (LOSS, NORMS):
        drawn = list(_curves(data, curves, top))
        if drawn:
            parts += [*drawn, *_incidents(data, top, CURVE)]
            top += CURVE + GAP
    heat, height = _heatmap(data, top)
    parts += heat
    top += height
    name = _text(f"Norms and layers of {data.name}, steps {data.first_step} to {data.last_step}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}" role="img"'
        f' aria-label="{name}">{"".join(parts)}</svg>'
    )


def _x(data: ReportData, steps: Floats) -> Floats:
    span = max(data.last_step - data.first_step + 1, 1)
    return GUTTER + (steps - data.first_step) / span * (WIDTH - GUTTER - 10)


def _curves(data: ReportData, curves: Sequence[Curve], top: int) -> Iterator[str]:
    """Yield the lines of one chart, on a logarithmic axis where all is above zero and spans a hundredfold."""
    when, values_CT = _values(data, curves)
    finite, is_bad = values_CT[np.isfinite(values_CT)], (np.isnan(values_CT) | np.isposinf(values_CT)).any(axis=0)
    if not (len(finite) or is_bad.any()):
        return
    is_log = bool(len(finite) and finite.min() > 0 and finite.max() >= 100 * finite.min())
    ends = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    low, high = (float(np.log10(end)) if is_log else float(end) for end in ends)
    span = high - low or 1.0
    yield f'<path d="M{GUTTER} {top}v{CURVE}H{WIDTH - 10}" fill="none" stroke="#b9c0c9"/>'
    if is_bad.any():
        marks = "".join(f"M{x:.0f} {top}v6" for x in np.unique(np.round(_x(data, when[is_bad]))))
        yield f'<path d="{marks}" stroke="#{BAD_COLOR}" stroke-width="2"/>'
    for value, y in ((high, top + 8), (low, top + CURVE)) if len(finite) else ():
        yield _label(GUTTER - 6, y, f"{10**value if is_log else value:.3g}", anchor="end")
    drawn = [(c, row) for c, row in zip(curves, values_CT, strict=True) if not np.isneginf(row).all()]
    for place, (curve, values) in enumerate(drawn):
        with np.errstate(all="ignore"):
            height = (np.log10(values) if is_log else values) - low
        heights = top + CURVE - height / span * (CURVE - 8)
        style = f'fill="none" stroke="#{curve.color}" stroke-width="1.4"'
        style += f' stroke-dasharray="{curve.dashes}"' if curve.dashes else ' stroke-linecap="round"'
        yield f'<path d="{_line(_x(data, when), heights)}" {style}/>'
        yield f'<path d="M6 {top + 24 + 16 * place}h14" {style.replace("1.4", "2.5")}/>'
        yield _label(26, top + 28 + 16 * place, curve.label)


def _values(data: ReportData, curves: Sequence[Curve]) -> tuple[Floats, Floats]:
    """Return steps (T,) and the curves' values over them (C, T), pooled; `MISSING` where there is none to draw."""
    held = [data.scalars[curve.name] for curve in curves if curve.name in data.scalars]
    steps = np.unique(np.concatenate([np.asarray(when, np.float64) for when, _ in held])) if held else np.zeros(0)
    table = np.full((len(steps), len(curves)), MISSING, np.float32)
    for place, curve in enumerate(curves):
        when, values = data.scalars.get(curve.name, ((), ()))
        table[np.searchsorted(steps, np.asarray(when, np.float64)), place] = np.asarray(values, np.float64)
    when, pooled = pool(steps, table, 4 * MAX_COLUMNS)
    values_CT = pooled.T.astype(np.float64)
    names = [curve.name for curve in curves]
    shown = values_CT.copy()
    for place, curve in enumerate(curves):
        if curve.apart_from:
            shown[place, lies_on(values_CT[place], values_CT[names.index(curve.apart_from)])] = MISSING
    return when, shown


def _line(x: Floats, y: Floats) -> str:
    """Return a path over what is finite; a point that stands alone is a dot."""
    known = np.isfinite(y)
    begins = known & ~np.append(False, known[:-1])
    alone = begins & ~np.append(known[1:], False)
    marks = zip(x, y, known, begins, alone, strict=True)
    return "".join(f"{'M' if b else 'L'}{a:.0f} {c:.0f}{'h1' if one else ''}" for a, c, k, b, one in marks if k)


def _incidents(data: ReportData, top: int, height: int) -> Iterator[str]:
    for incident in data.incidents[:60]:
        x = float(_x(data, np.array([incident.first_step], np.float64))[0])
        color = SEVERITIES.get(incident.severity, SEVERITIES["info"])
        yield f'<path d="M{x:.0f} {top}v{height}" stroke="#{color}" stroke-dasharray="3 3"/>'


def _heatmap(data: ReportData, top: int) -> tuple[list[str], int]:
    """Return the heatmap of gradient norms with its axis and legend, and how high it is."""
    table, index = data.tables.get("grad_norm"), data.index
    if table is None or not len(table.steps):
        return [], 0
    rows = np.flatnonzero(index.is_parameter & (index.ndim >= 2) & (table.values != MISSING).any(axis=0))
    rows = rows if len(rows) else np.flatnonzero(index.is_parameter)
    rows = rows[np.argsort(index.depth[rows], kind="stable")]
    left_out = max(0, len(rows) - MAX_ROWS)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_ROWS)).astype(int))]
    steps, values = pool(table.steps, table.values[:, rows], MAX_COLUMNS)
    sizes = values[np.isfinite(values) & (values > 0)]
    low, high = np.quantile(np.log10(sizes), (0.01, 0.99)) if len(sizes) else (-1.0, 1.0)
    high = max(high, low + 0.5)
    level = _levels(values.T, float(low), float(high))
    edges = np.append(_x(data, steps), WIDTH - 10)
    each = 14
    parts = list(_cells(level, edges, top, each))
    for i, row in enumerate(rows.tolist()):
        parts.append(_label(GUTTER - 6, top + each * i + 11, _short(index.paths[row]), anchor="end"))
    y = top + each * len(rows) + 14
    parts += [_label(GUTTER, y, str(data.first_step)), _label(WIDTH - 10, y, f"step {data.last_step}", anchor="end")]
    more = f"; {left_out} layers between these are left out" if left_out else ""
    parts += _legend(y + 12, float(low), float(high), more)
    return parts, each * len(rows) + 56


def _levels(values_NT: NDArray[np.float32], low: float, high: float) -> NDArray[np.int64]:
    """Return a level for each cell: 0 to LEVELS - 1, then zero, not measured, not finite."""
    with np.errstate(all="ignore"):
        place = (np.log10(values_NT.astype(np.float64)) - low) / (high - low) * LEVELS
    level = np.clip(np.nan_to_num(place, nan=0, posinf=LEVELS, neginf=0), 0, LEVELS - 1).astype(np.int64)
    level = np.where(values_NT == 0, LEVELS, level)
    level = np.where(np.isnan(values_NT) | np.isposinf(values_NT), LEVELS + 2, level)
    return np.where(values_NT == MISSING, LEVELS + 1, level)


def _cells(level_NT: NDArray[np.int64], edges: Floats, top: int, each: int) -> Iterator[str]:
    """Yield one path for each level: neighbours of one level in a row are one rectangle."""
    runs: dict[int, list[str]] = {}
    for row, levels in enumerate(level_NT):
        starts = np.flatnonzero(np.diff(levels, prepend=-1))
        ends = np.append(starts[1:], len(levels))
        for a, b in zip(starts.tolist(), ends.tolist(), strict=True):
            left, right = round(float(edges[a])), round(float(edges[b]))
            rectangle = f"M{left} {top + row * each}h{max(1, right - left)}v{each - 1}H{left}z"
            runs.setdefault(int(levels[a]), []).append(rectangle)
    for level, rectangles in sorted(runs.items()):
        yield f'<path fill="#{_color(level)}" d="{"".join(rectangles)}"/>'


def _color(level: int) -> str:
    return (*VIRIDIS, ZERO_COLOR, MISSING_COLOR, BAD_COLOR)[level]


def _legend(y: int, low: float, high: float, more: str) -> Iterator[str]:
    yield _label(GUTTER, y + 10, f"gradient norm {10**low:.2g}")
    x = GUTTER + 130
    for k, color in enumerate(VIRIDIS):
        yield f'<rect x="{x + 10 * k}" y="{y + 1}" width="10" height="10" fill="#{color}"/>'
    x += 10 * LEVELS + 6
    yield _label(x, y + 10, f"{10**high:.2g}")
    x += 60
    for color, text in ((ZERO_COLOR, "zero"), (MISSING_COLOR, "not measured"), (BAD_COLOR, "NaN or ∞")):
        yield f'<rect x="{x}" y="{y + 1}" width="10" height="10" fill="#{color}"/>'
        yield _label(x + 14, y + 10, text)
        x += 24 + 7 * len(text)
    if more:
        yield _label(GUTTER, y + 26, more.removeprefix("; "))


def _label(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="#656d76">{_text(text)}</text>'


def _short(path: str) -> str:
    path = path.removesuffix(".weight")
    return path if len(path) <= 30 else f"…{path[-29:]}"


def _text(text: str) -> str:
    return escape_html(printable(text, keep=""))
