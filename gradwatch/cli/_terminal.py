"""Data to stdout, talk to stderr: with rich on a terminal where it is installed, as plain text otherwise."""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._text import printable

__all__ = [
    "STYLES",
    "Grid",
    "columns",
    "plain",
    "printable",
    "rich_console",
    "say",
    "show",
    "show_grid",
    "show_json",
    "show_lines",
]

STYLES = {
    "critical": "bold red",
    "warning": "yellow",
    "info": "cyan",
    "fine": "green",
    "dim": "dim",
    "head": "bold",
    "": "",
}


LEAST = 8
"""Characters that a name keeps in a narrow table."""


@dataclass
class Grid:
    """A table.

    Attributes:
        heads: titles of the columns.
        rows: cells, as text.
        styles: one of `STYLES` per row.
        right: columns that are flush right.
        flexible: the column that is shortened where the terminal is narrow; names keep their ends.
        droppable: the column, the last one, that is left out where that is not enough; None: none is.
    """

    heads: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    right: Sequence[int] = ()
    flexible: int = 0
    droppable: int | None = None

    def add(self, *cells: str, style: str = "") -> None:
        self.rows.append([printable(cell, keep="") for cell in cells])
        self.styles.append(style)

    def lines(self, width: int | None = None) -> list[str]:
        """Return the table as lines of text, at most `width` characters long: the flexible column gives way first, then
        the widest of the other names."""
        table = [list(self.heads), *(list(row) for row in self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.heads))]
        if width is not None:
            over = sum(widths) + 2 * (len(widths) - 1) - width
            widths[self.flexible] -= max(0, min(over, widths[self.flexible] - 12))
            self._shorten(widths, width)
            if self.droppable is not None and sum(widths) + 2 * (len(widths) - 1) > width:
                widths = widths[: self.droppable]
        return [self._line(row[: len(widths)], widths) for row in table]

    def _shorten(self, widths: list[int], width: int) -> None:
        names = [i for i in range(len(widths)) if i not in self.right]
        while sum(widths) + 2 * (len(widths) - 1) > width:
            widest = max(names, key=widths.__getitem__)
            if widths[widest] <= LEAST:
                return
            widths[widest] -= 1

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            fitting = cell if len(cell) <= width else "..." + cell[len(cell) - width + 3 :]
            cells.append(fitting.rjust(width) if i in self.right else fitting.ljust(width))
        return "  ".join(cells).rstrip()


def say(text: str) -> None:
    """Talk, on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def rich_console() -> Any | None:
    """Return rich's console for stdout where rich is installed and stdout is a terminal, else None."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    return console if console.is_terminal else None


def columns() -> int:
    """Return how wide the terminal is; 100 where stdout is none."""
    return max(shutil.get_terminal_size((100, 24)).columns, 40)


def show(text: str = "", style: str = "", *, indent: int = 0) -> None:
    """Print text to stdout, wrapped to the terminal."""
    space, lines = " " * indent, []
    for line in printable(text).split("\n"):
        wrapped = textwrap.wrap(
            line,
            min(columns(), 110),
            initial_indent=space,
            subsequent_indent=space,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += wrapped or [""]
    show_lines([(line, style) for line in lines])


def show_grid(grid: Grid) -> None:
    """Print a table to stdout."""
    console = rich_console()
    head, *rows = grid.lines(columns() if console is not None else None)
    show_lines([(head, "head"), *zip(rows, grid.styles, strict=True)])


def show_lines(lines: Sequence[tuple[str, str]]) -> None:
    """Print lines, each with its style, to stdout."""
    console = rich_console()
    if console is None:
        print("\n".join(printable(line) for line, _ in lines), flush=True)
        return
    for line, style in lines:
        console.print(printable(line), style=STYLES[style] or None, soft_wrap=True)


def show_json(value: Any) -> None:
    """Print one JSON document to stdout; non-finite numbers are strings."""
    print(json.dumps(plain(value), indent=1, allow_nan=False), flush=True)


def plain(value: Any) -> Any:
    """Return what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
