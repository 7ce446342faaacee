"""Lines for the user of a running program: a stream that can't take them must not end the run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

from .._text import printable
from ..watch import Session

__all__ = ["say", "say_ending"]


def say(text: str, via: Callable[[str], object] = print) -> None:
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
            encoding = getattr(sys.stdout, "encoding", None) or "ascii"
            via(text.encode(encoding, "backslashreplace").decode(encoding))


def say_ending(session: Session, *, no_files: str = "") -> None:
    """Print what a run came to, and where it was written.

    Args:
        session: that has come to its end.
        no_files: why nothing was written, where something could have been.
    """
    say(session.summary())
    if session.wrote:
        say(f"gradwatch wrote {session.run_dir}; `gradwatch report` turns it into a page")
    elif session.run_dir is not None:
        say(f"gradwatch could not write all of {session.run_dir}: {session.sinks.trouble or 'it is not there'}")
    elif no_files and session.incidents:
        say(f"gradwatch wrote no files: {no_files}. `run_dir=` names a folder for them")
