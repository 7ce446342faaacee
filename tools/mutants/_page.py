"""The page on which results are kept with the code: people read it, and the next run begins with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ._changes import Mutant

__all__ = ["read", "written"]

_ROW = re.compile(r"\| (?:`` (?P<function>.*?) ``|at import) \| `` (?P<change>.*) `` \| (?P<told>.*) \|")
_ENDS = {"hung": "the tests hang", "died at import": "it can't be imported", "died": "the process dies"}


def written(mutants: Sequence[Mutant], results: Mapping[Any, Mapping[str, Any]], told: str, command: str) -> str:
    """Return the page: by file, of every change, which test notices it, or why none does.

    No line numbers, dates or times are on it: it changes where the code, the tests or the reasons do.

    Args:
        mutants: all changes.
        results: by key, what was found; of what survived `reason`.
        told: the score, in a sentence.
        command: that makes the page.
    """
    parts = [f"# Mutants\n\nMade by `{command}` (see CONTRIBUTING.md). {told}\n"]
    for file, changes in groupby(sorted(mutants, key=lambda m: (m.file, m.line, m.change)), key=lambda m: m.file):
        rows = [
            f"| {_code(m.function) if m.function else 'at import'} | {_code(m.change)} | {_told(results.get(m.key))} |"
            for m in changes
        ]
        parts.append("\n".join((f"## {file}\n", "| in | change | noticed by |", "|---|---|---|", *rows, "")))
    return "\n".join(parts)


def read(page: Path, root: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return what the page tells by key, as far as it still holds: a test that noticed must still be there."""
    found, file = {}, ""
    for line in page.read_text().splitlines() if page.exists() else ():
        file = line[3:] if line.startswith("## ") else file
        row = _ROW.fullmatch(line)
        result = _result(row["told"].replace(r"\|", "|")) if row else None
        if row and result and _is_there(result["why"], root):
            key = file, (row["function"] or "").replace(r"\|", "|"), row["change"].replace(r"\|", "|")
            found[key] = {"key": list(key), **result}
    return found


def _code(text: str) -> str:
    return "`` " + text.replace("|", r"\|") + " ``"


def _told(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not judged"
    if not found["killed"]:
        return f"nothing: {found.get('reason') or 'NO REASON GIVEN'}".replace("|", r"\|")
    why = found["why"]
    return _code(why) if "::" in why else _ENDS.get(why, _ENDS["died"])


def _result(told: str) -> dict[str, Any] | None:
    if told == "not judged":
        return None
    if told.startswith("nothing: "):
        return {"killed": False, "why": "no test, says the page"}
    ends = {words: why for why, words in _ENDS.items()}
    return {"killed": True, "why": ends.get(told) or told.removeprefix("`` ").removesuffix(" ``")}


def _is_there(test: str, root: Path) -> bool:
    """Return whether a test is where it was; what is none is."""
    file, _, name = test.partition("[")[0].partition("::")
    path = root / file
    return not name or (path.exists() and f"def {name.rpartition('::')[2]}(" in path.read_text())
