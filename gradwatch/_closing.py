"""Ending several things although any of them may fail, or be interrupted."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import suppress

__all__ = ["Surroundings", "end_all", "how_ended", "insist", "why_ended"]


def end_all(*steps: Callable[[], object]) -> None:
    """Take every step, in order, whatever another raises; then raise what came up last."""
    if not steps:
        return
    try:
        steps[0]()
    finally:
        end_all(*steps[1:])


def insist(close: Callable[[], object]) -> None:
    """Close, and once more if that is interrupted: what Ctrl-C left half way is brought to its end before it goes on.

    Args:
        close: bears to be called again, at any point that it came to.
    """
    try:
        close()
    except Exception:
        raise
    except BaseException:
        with suppress(Exception):
            close()
        raise


class Surroundings:
    """Tells an exception that came up since this was made from one inside of whose handler all of it happens."""

    def __init__(self) -> None:
        # Its number, not the exception: that holds the frames of a whole program.
        self._handled = id(sys.exc_info()[1])

    def error(self) -> BaseException | None:
        """Return the exception that is on its way through a `finally`, or being handled; None where there is none, or
        it is how an iteration ends."""
        error = sys.exc_info()[1]
        if id(error) == self._handled or isinstance(error, (StopIteration, StopAsyncIteration, GeneratorExit)):
            return None
        return error


def why_ended(error: BaseException | None) -> str:
    """Return what to put on record of a run that an exception ended; "" where none did."""
    if error is None:
        return ""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"crashed: {type(error).__name__}: {str(error)[:200]}".rstrip(": ")


def how_ended(why: str, step: int) -> str:
    """Return how a run ended that did not come to its end, in a few words: `crashed (ValueError in training step 120)`.

    Args:
        why: as `why_ended` puts it on record; "" for one that was closed.
        step: during which it ended; below 0: not known.
    """
    at = f" in training step {step}" if step >= 0 else ""
    if why.startswith("crashed"):
        kind = re.match(r"crashed: ([\w.]+)", why)
        return f"crashed ({kind[1] if kind else 'an exception'}{at})"
    return f"{why or 'closed before its end'}{at}"
