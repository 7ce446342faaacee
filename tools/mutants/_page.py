"""The page on which results are kept with the code: people read it, and the next run begins with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ._changes import Mutant

__all__ = ["read", "written"]

_ROW = re.compile(r"\| (?P<file>\S+\.py)(?: `` (?P<function>.*?) ``)? \| `` (?P<change>.*) `` \| (?P<told>.*) \|")
_ENDS = {"hung": "the tests hang", "died at import": "it can't be imported", "died": "the process dies"}


def written(mutants: Sequence[Mutant], results: Mapping[Any, Mapping[str, Any]], told: str, command: str) -> str:
    """Return the page: by folder, of every change, which test notices it, or why none does.

    No line numbers, dates or times are on it: it changes where the code, the tests or the reasons do.

    Args:
        mutants: all changes.
        results: by key, what was found; of what survived `reason`.
        told: the score, in a sentence.
        command: that makes the page.
    """
    parts = [f"# Mutants\n\nMade by `{command}` (see CONTRIBUTING.md). {told}\n"]
    for folder, changes in groupby(sorted(mutants, key=lambda m: (m.file, m.line, m.change)), key=_folder):
        rows = [
            f"| {m.file.rpartition('/')[2]}{m.function and ' ' + _code(m.function)} | {_code(m.change)} "
            f"| {_told(results.get(m.key))} |"
            for m in changes
        ]
        parts.append("\n".join((f"## {folder}\n", "| where | change | noticed by |", "|---|---|---|", *rows, "")))
    return "\n".join(parts)


def read(page: Path, root: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return what the page tells by key, as far as it still holds: a test that noticed must still be there."""
    found, folder = {}, ""
    for line in page.read_text().splitlines() if page.exists() else ():
        folder = line[3:] if line.startswith("## ") else folder
        row = _ROW.fullmatch(line)
        result = _result(row["told"].replace(r"\|", "|")) if row else None
        if row and result and _is_there(result["why"], root):
            file = f"{folder}/{row['file']}".removeprefix("./")
            key = file, (row["function"] or "").replace(r"\|", "|"), row["change"].replace(r"\|", "|")
            found[key] = {"key": list(key), **result}
    return found


def _folder(mutant: Mutant) -> str:
    return mutant.file.rpartition("/")[0] or "."


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
