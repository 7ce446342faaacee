"""Ending several things although any of them may fail, or be interrupted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

__all__ = ["end_all", "insist", "why_ended"]


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


def why_ended(error: BaseException | None) -> str:
    """Return what to put on record of a run that an exception ended; "" where none did."""
    if error is None:
        return ""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"crashed: {type(error).__name__}: {str(error)[:200]}".rstrip(": ")
