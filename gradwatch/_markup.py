"""Text as HTML and as a notebook shows it. Every name out of a run is escaped here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape as escape_html
from typing import Any

from ._text import printable

__all__ = ["TONES", "Prints", "Text", "card", "escape", "number", "table", "told"]

TONES = {
    "critical": "#e12a49",
    "bad": "#e12a49",
    "warning": "#b26105",
    "info": "#2576d3",
    "good": "#1d8752",
    "unseen": "#6e7781",
}
"""Colours of marks that stand out on a white and on a dark page alike: 4 to 1 and more."""

_CELL = "padding:3px 10px 3px 0;text-align:left;vertical-align:top;overflow-wrap:break-word"
_CARD = "max-width:760px;font-size:13px;line-height:1.45"


class Prints:
    """Shown in a notebook's plain text, and at IPython's prompt, as `str` gives it."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        # IPython goes from class to class, and takes a class's own `__repr__` before what its base says.
        cls._repr_pretty_ = cls._repr_pretty_  # type: ignore[method-assign]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(type(self).__name__ if cycle else printable(self))


class Text(str):
    """A text that a notebook shows as it is, line under line, or as HTML where there is a form in HTML.

    Args:
        text: the text.
        html: returns the form in HTML; None: the text itself.
    """

    __slots__ = ("_html",)
    _html: Callable[[], str] | None

    def __new__(cls, text: str, html: Callable[[], str] | None = None) -> Text:
        made = super().__new__(cls, text)
        made._html = html
        return made

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self)}</pre>" if self._html is None else self._html()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def __reduce__(self) -> Any:
        return str, (str(self),)


def escape(text: object) -> str:
    """Return text as HTML shows it: no markup, and nothing that a terminal or an encoder would stumble over."""
    return escape_html(printable(text))


def number(value: float) -> str:
    """Return three digits, and words for what is not finite."""
    if math.isnan(value):
        return "NaN"
    return ("∞" if value > 0 else "-∞") if math.isinf(value) else f"{value:.3g}"


def told(text: str, tone: str) -> str:
    """Return a word with a mark in the colour of its tone before it, as HTML. The word keeps the page's own colour:
    none can be read on every page."""
    mark = f"border-left:5px solid {TONES.get(tone, TONES['warning'])};padding-left:5px"
    return f'<span style="{mark}">{escape(text)}</span>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. Heads are text; cells are HTML: what is text in them was escaped."""
    head = "".join(f'<th scope="col" style="{_CELL};font-weight:600">{escape(h)}</th>' for h in heads)
    body = "".join("<tr>" + "".join(f'<td style="{_CELL}">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    style = "border-collapse:collapse;font-size:inherit"
    whole = f'<table style="{style}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div style="overflow-x:auto;margin:4px 0">{whole}</div>'


def card(headline: str, tone: str, *parts: str) -> str:
    """Return a headline with a bar in the colour of its tone, and parts of HTML below.

    Styles stand in the elements: a notebook may strip a style sheet, and one must not reach other cells. Text keeps the
    page's own colour, so that it can be read on a dark one.
    """
    bar = f"border-left:4px solid {TONES.get(tone, TONES['warning'])};padding:4px 10px;margin:4px 0"
    return f'<div style="{_CARD}"><div style="{bar}"><b>{escape(headline)}</b></div>{"".join(parts)}</div>'
