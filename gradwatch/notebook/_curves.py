"""Curves over steps as a small picture, with words around it.

A notebook that was not run here is not trusted: it loses every SVG element that stands in a cell, and keeps pictures.
So the lines are an SVG in an address, and the words are text of the page: in its colour, which a picture can't know.
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .._markup import TONES, escape, number
from ..records import Bools, Floats, Incident

__all__ = ["Curve", "curves", "lies_on"]

WIDTH, HEIGHT, LEFT, TOP = 720, 92, 64, 12
RIGHT = WIDTH - 8
MOST_TICKS, MOST_TOLD = 200, 8

_WORDS = "font-size:11px;line-height:1.4;margin:4px 0"
_ROW = "display:flex;justify-content:space-between"


@dataclass(frozen=True, eq=False)
class Curve:
    """One line: `values` (T,) over the chart's steps, -inf where there is none; drawn in `color`."""

    name: str
    values: Floats
    color: str


def lies_on(values: Floats, others: Floats) -> Bools:
    """Return where a curve lies on another, its neighbours included, and would hide it."""
    with np.errstate(all="ignore"):
        lies = np.pad(np.abs(values - others) <= 1e-6 * np.abs(others), 1, constant_values=True)
    return lies[:-2] & lies[1:-1] & lies[2:]


def curves(
    title: str, steps: Floats, last_step: int, lines: Sequence[Curve], incidents: Sequence[Incident], *, is_log: bool
) -> str:
    """Return a chart. Steps at which a line is nan or infinite are red bars along the top; incidents are triangles.

    Args:
        title: what is drawn, with its unit.
        steps: (T,) ascending, the first of each point.
        last_step: of the last point.
        lines: at least one measurement in any of them, else "" is returned.
        incidents: marked at their first step.
        is_log: draw log10; what is not above zero is left out.
    """
    drawn = [(line, _scaled(line.values, is_log=is_log)) for line in lines]
    seen = np.concatenate([values[np.isfinite(values)] for _, values in drawn])
    broken = np.any([~np.isfinite(line.values) & (line.values != -np.inf) for line in lines], axis=0)
    if not (len(seen) or broken.any()):
        return ""
    ends = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 1.0)
    frame = _Frame.around(float(steps[0]), float(last_step), *ends)
    marked = [i for i in incidents if frame.first <= i.first_step <= frame.last]
    parts = [_path(frame, steps, values, line.color) for line, values in drawn]
    parts += [_tick(frame.x(step)) for step in steps[broken][:MOST_TICKS].tolist()]
    parts += [_mark(frame.x(i.first_step), i) for i in marked]
    said = f"{escape(title)} from step {frame.first:,.0f} to {frame.last:,.0f}"
    heights = frame.heights(is_log=is_log) if len(seen) else ("", "")
    return _figure(_picture(parts, said, marked), heights, frame, _caption(title, lines))


def _figure(picture: str, heights: tuple[str, str], frame: _Frame, caption: str) -> str:
    """Return a picture between its words: the ends of its axes, and what is drawn."""
    high, low = (f'<div style="opacity:.75">{escape(height)}</div>' for height in heights)
    side = f"width:{LEFT - 6}px;padding-right:6px;text-align:right;flex-shrink:0"
    beside = f'<div style="{side};{_ROW};flex-direction:column">{high}{low}</div>'
    ends = (f"step {frame.first:,.0f}", f"{frame.last:,.0f}")
    first, last = (f'<div style="opacity:.75">{end}</div>' for end in ends)
    below = f'<div style="{_ROW};padding-left:{LEFT}px">{first}<div>{caption}</div>{last}</div>'
    return f'<div style="{_WORDS}"><div style="{_ROW}">{beside}{picture}</div>{below}</div>'


def _picture(parts: Sequence[str], said: str, incidents: Sequence[Incident]) -> str:
    """Return an image element. What stands in it is numbers and colours: no name out of a run."""
    width = RIGHT - LEFT
    axes = f'<path d="M.5 {TOP}V{HEIGHT - 0.5}H{width}" fill="none" stroke="#888" opacity=".6"/>'
    drawn = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}">{axes}{"".join(parts)}</svg>'
    address = f"data:image/svg+xml;base64,{b64encode(drawn.encode()).decode()}"
    told = "&#10;".join(escape(i) for i in incidents[:MOST_TOLD])
    return f'<img alt="{said}" title="{told}" src="{address}" style="width:100%;min-width:0">'


@dataclass(frozen=True)
class _Frame:
    """The steps and values (as drawn) of a chart, and where they lie."""

    first: float
    last: float
    low: float
    high: float

    @classmethod
    def around(cls, first: float, last: float, low: float, high: float) -> _Frame:
        """Return a frame that is nowhere of no width."""
        half = 0.5 if high - low < 1e-9 * max(abs(high), 1.0) else 0.0
        return cls(first, max(last, first + 1), low - half, high + half)

    def x(self, step: float) -> float:
        return (RIGHT - LEFT) * (step - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        return TOP + (HEIGHT - TOP) * (1 - (value - self.low) / (self.high - self.low))

    def heights(self, *, is_log: bool) -> tuple[str, str]:
        """Return the words at the upper and at the lower end."""
        low, high = (10**self.low, 10**self.high) if is_log else (self.low, self.high)
        return number(high), number(low)


def _caption(title: str, lines: Sequence[Curve]) -> str:
    swatch = "display:inline-block;width:14px;vertical-align:middle;border-top:2px solid"
    named = [f'<span style="{swatch} {line.color}"></span> {escape(line.name)}' for line in lines if len(lines) > 1]
    return " &nbsp; ".join([escape(title), *named])


def _tick(x: float) -> str:
    return f'<rect x="{x:.1f}" y="{TOP}" width="2" height="6" fill="#e5002e"/>'


def _scaled(values: Floats, *, is_log: bool) -> Floats:
    if not is_log:
        return np.where(np.isfinite(values), values, np.nan)
    sized = np.isfinite(values) & (values > 0)
    return np.where(sized, np.log10(np.where(sized, values, 1.0)), np.nan)


def _path(frame: _Frame, steps: Floats, values: Floats, color: str) -> str:
    """Return a line that breaks where there is no number; a number alone is a dot."""
    commands, is_down = [], False
    for step, value in zip(steps.tolist(), values.tolist(), strict=True):
        if math.isnan(value):
            is_down = False
            continue
        commands.append(f"{'L' if is_down else 'M'}{frame.x(step):.1f} {frame.y(value):.1f}{'' if is_down else 'h.1'}")
        is_down = True
    return f'<path d="{"".join(commands)}" fill="none" stroke="{color}" stroke-width="1.4" stroke-linecap="round"/>'


def _mark(x: float, incident: Incident) -> str:
    color = TONES.get(incident.severity, TONES["warning"])
    return f'<path d="M{x - 5:.1f} 0h10l-5 9z" fill="{color}"/>'
