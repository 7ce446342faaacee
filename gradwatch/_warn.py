"""Telling the user that something of gradwatch's own failed: the telling itself never ends a run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ._text import printable
from .errors import GradwatchWarning

__all__ = ["LIMIT", "log", "one_line", "unheard", "warn"]

LIMIT = 200
"""Characters that are kept of what another library says: a dispatcher's error fills a screen."""

_log = logging.getLogger("gradwatch")


def one_line(text: object, limit: int = LIMIT) -> str:
    """Return what an exception (with its type) or anything else says, as one line of at most `limit` characters."""
    # Nothing here may raise, and `str` of another's exception may.
    try:
        words = " ".join(str(text).split())
    except Exception:
        words = "(its message can't be read)"
    if isinstance(text, BaseException):
        words = f"{type(text).__name__}: {words}" if words else type(text).__name__
    words = printable(words, keep="")
    return words if len(words) <= limit else words[: limit - 3] + "..."


def warn(message: str, category: type[Warning] = GradwatchWarning, *, stacklevel: int = 1) -> None:
    """Give a warning; where warnings are errors, or the way to show them is broken, tell the `gradwatch` logger.

    Args:
        message: one line.
        category: of the warning.
        stacklevel: as in `warnings.warn`, seen from the caller.
    """
    message = printable(message)
    try:
        warnings.warn(message, category, stacklevel=stacklevel + 1)
    except Exception:
        with suppress(Exception):
            _log.warning("%s", message)


def log(message: str) -> None:
    """Log a line at level WARNING; handlers that raise and streams that are closed lose it."""
    with suppress(Exception):
        _log.warning("%s", printable(message))


@contextmanager
def unheard() -> Iterator[None]:
    """Keep what others warn of to ourselves, where it is of a trial that the user did not ask for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
