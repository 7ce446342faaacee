"""Lines for the user of a running program, on stderr: stdout is the program's own, and may go into a pipe.

A stream that can't take them must not end the run.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .._text import as_typed, printable
from ..watch import Session

__all__ = ["fitted", "say", "say_beside", "say_ending"]


def _to_stderr(text: str) -> None:
    # In one piece: lines of which the last has no end send rich's stand-in for stderr round and round in a notebook.
    print(f"{text}\n", end="", file=sys.stderr)


def say(text: str, via: Callable[[str], object] = _to_stderr) -> None:
    """Print a text; what the stream can't encode is escaped, and where it is full or closed the text is lost.

    Args:
        text: names of the user's modules among it, in any script.
        via: what prints, a progress bar's `print` say.
    """
    text = printable(text)
    # Anything: a full disk, a closed pipe, a bar that takes brackets in a name for markup.
    with suppress(Exception):
        try:
            via(text)
        except UnicodeEncodeError:
            encoding = getattr(sys.stderr, "encoding", None) or "ascii"
            via(text.encode(encoding, "backslashreplace").decode(encoding))


def say_beside(bar: Any, text: str) -> None:
    """Print a text without breaking a Lightning progress bar; None: there is none."""

    def through(line: str) -> None:
        try:
            bar.print(f"{line}\n", end="", file=sys.stderr)
        except TypeError:  # a bar of the user's that takes a text alone
            _to_stderr(line)

    say(text, _to_stderr if bar is None else through)


def fitted(text: str, width: int | None = None) -> str:
    """Return text whose lines fit the terminal; what goes on is set in.

    Args:
        width: of the terminal, where it is known.
    """
    width = max(40, width or shutil.get_terminal_size((80, 24)).columns)
    return "\n".join(_fitted(line, width) for line in text.split("\n"))


def _fitted(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()))
    more = f"{indent}    "
    wrapped = textwrap.wrap(
        line.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=more,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(wrapped)


def say_ending(session: Session, *, no_files: str = "") -> None:
    """Print what a run came to, and where it was written.

    Args:
        session: that has come to its end.
        no_files: why nothing was written, where something could have been.
    """
    say(fitted(session.summary()))
    folder = as_typed(str(session.run_dir))
    if session.wrote:
        say(f"gradwatch wrote {folder}; `gradwatch report` turns it into a page")
    elif session.run_dir is not None:
        say(f"gradwatch could not write all of {folder}: {session.sinks.trouble or 'it is not there'}")
    elif no_files and session.incidents:
        say(f"gradwatch wrote no files: {no_files}. `run_dir=` names a folder for them")
