"""Text from outside (names of modules and rules, others' messages) made fit for a terminal, a message, a file name."""

from __future__ import annotations

import hashlib
import reprlib
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["as_bytes", "as_typed", "file_name", "listed", "printable", "replay_command", "shown"]

NAME_LENGTH = 48
"""Characters of a name that a file name keeps: four bytes each at most, and file systems take 255."""

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxdict = 6
_REPR.maxlevel = 3


def printable(text: object, *, keep: str = "\n") -> str:
    """Return text without what a terminal would obey: every terminal line goes through here.

    Control characters, escape sequences, marks that turn the direction of writing and halves of surrogate pairs become
    question marks.

    Args:
        text: from anywhere.
        keep: characters that stay, printable or not.
    """
    words = str(text)
    # Nearly all text: one pass in C.
    if words.isprintable():
        return words
    return "".join(c if c.isprintable() or c in keep else "?" for c in words)


def as_bytes(text: str) -> bytes:
    """Return text to be hashed: names may hold halves of surrogate pairs, which no UTF-8 has."""
    return text.encode("utf-8", "surrogatepass")


def as_typed(path: str) -> str:
    """Return a path as one would type it here: from the working directory where it lies below it."""
    with suppress(OSError, ValueError):
        return str(Path(path).resolve().relative_to(Path.cwd())) or path
    return path


def replay_command(folder: str) -> str:
    """Return what tells what other rules would have said of a run folder."""
    return f"gradwatch replay {shlex.quote(as_typed(folder))} --rules rules.yaml"


def shown(value: Any) -> str:
    """Return a value as an error message shows it: its repr, of bounded length however large the value is."""
    return printable(_REPR.repr(value))


def file_name(text: str) -> str:
    """Return a name that is one part of a path on every file system: no separators, no dots in front, not too long.

    A name that had to be changed ends in a digest of what it was, so that two of them stay two.
    """
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in text[:NAME_LENGTH]).lstrip(".") or "_"
    if safe == text:
        return safe
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{safe}-{digest}"


def listed(names: Sequence[str]) -> str:
    """Return the first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
