"""Writes what is made from the table of columns: docs/columns.md and the tab's columns.js.

`--check` only sees whether they are up to date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from gradwatch.records import FAMILIES, MODULE, PARAMETER, SCALAR, Column, columns

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "columns.md"
SCRIPT = ROOT / "tensorboard_plugin_gradwatch" / "static" / "columns.js"
DRAWN = ("label", "scale", "combine", "guide", "meaning")

HEAD = """# What a record holds

Every column and scalar that gradwatch measures, by the names they have on record, in expressions, in the tab and in
reports. This page is made from the table that these read (`gradwatch.records.columns()`) by `tools/columns.py`.

A column holds one number per path, a scalar one per step. What was not measured at a step is absent there; within a
column, a mask tells the paths that were not measured from a value that *is* nan. A cadence such as `histograms_every`
is the option of that name; beside its multiples, the first powers of two are measured, too.

"""


def page() -> str:
    """Return the page."""
    parts = [HEAD]
    for title, kind in (("Parameters", PARAMETER), ("Modules", MODULE)):
        rows = [
            (f"`{c.name}`", c.meaning, c.unit or "-", c.scale, _when(c.when), c.absent or "-")
            for c in columns(kind, own=False)
        ]
        parts.append(
            f"## {title}\n\n{_table(('name', 'meaning', 'unit', 'drawn', 'measured', 'absent where'), rows)}\n"
        )
    rows = [(f"`{c.name}`", c.meaning, _when(c.when), c.absent or "-") for c in columns(SCALAR, own=False)]
    parts.append(f"## Scalars\n\n{_table(('name', 'meaning', 'measured', 'absent where'), rows)}\n")
    families = [(f"`{name}...`", meaning) for name, meaning in FAMILIES.items()]
    parts.append(f"Names that depend on the run:\n\n{_table(('name', 'meaning'), families)}\n")
    parts.append(
        "What you measure yourself (see [Writing one's own](extending.md#a-statistic)) joins these tables:\n"
        "`gradwatch.records.add_column(Column(...))` says what there is to know of it.\n"
    )
    return "\n".join(parts)


def script() -> str:
    """Return the part of the table that pictures need, as a module."""
    drawn = [c for c in columns(own=False) if c.kind != SCALAR]
    lines = [f"  {c.name}: {json.dumps(_drawn(c), ensure_ascii=False)}," for c in drawn]
    return "\n".join(
        [
            "// Made by tools/columns.py from gradwatch's table of columns.",
            "",
            "export const COLUMNS = {",
            *lines,
            "};",
            "",
        ]
    )


def _drawn(column: Column) -> dict[str, object]:
    return {name: getattr(column, name) for name in DRAWN}


def _when(when: str) -> str:
    return f"`{when}`" if when.endswith("_every") else when


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def main() -> int:
    """Write, or compare; return the exit status."""
    stale = [file for file, text in ((PAGE, page()), (SCRIPT, script())) if _differs(file, text)]
    if "--check" in sys.argv:
        for file in stale:
            print(f"{file.relative_to(ROOT)} is not up to date: run python tools/columns.py")
        return int(bool(stale))
    PAGE.write_text(page(), encoding="utf-8")
    SCRIPT.write_text(script(), encoding="utf-8")
    return 0


def _differs(file: Path, text: str) -> bool:
    return not file.is_file() or file.read_text(encoding="utf-8") != text


if __name__ == "__main__":
    sys.exit(main())
