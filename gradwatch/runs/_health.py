"""How a run folder ended, and whether all of it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._closing import how_ended
from .._markup import Prints

__all__ = ["STATES", "Health", "health_of"]

UNTOLD = "how it ended is not on record"
STATES = ("complete", "interrupted", "crashed", "recording failed", "running", "lost", "unknown")


@dataclass(frozen=True)
class Health(Prints):
    """What a recording says of itself.

    Attributes:
        state: `"complete"` (a clean end, and all of it is on record), `"interrupted"`, `"crashed"`,
            `"recording failed"` (the training went on, the disk did not), `"running"` (its writer lives),
            `"lost"` (it has no end: killed, or the machine stopped), `"unknown"` (of logs of other programs).
        words: the same in a few words: `crashed (ValueError in training step 120)`.
        num_missing: records that were counted and are not there.
        gaps: what is missing where and why, a sentence each.
    """

    state: str
    words: str
    num_missing: int = 0
    gaps: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join([self.words, *self.gaps])


def health_of(
    session: Mapping[str, Any], *, is_written: bool, num_missing: int = 0, gaps: Sequence[str] = ()
) -> Health:
    """Return the health of a folder from what its last session says in meta.json.

    Args:
        session: the last one.
        is_written: a writer that lives holds the folder.
        num_missing, gaps: what is missing of it.
    """
    state, words = _end(session, is_written)
    if state == "complete" and num_missing:
        state, words = "recording failed", "recording failed, the training came to its end"
    return Health(state, words, num_missing, tuple(gaps))


def _end(session: Mapping[str, Any], is_written: bool) -> tuple[str, str]:
    why, ended_at = str(session.get("ended") or ""), session.get("ended_at")
    how = how_ended(why, ended_at if isinstance(ended_at, int) else -1)
    if session.get("failed"):
        return "recording failed", f"recording failed ({session['failed']})"
    if why:
        return "crashed" if why.startswith("crashed") else "interrupted", how
    if session.get("complete") and session.get("finished") is not None:
        return "complete", "complete"
    if session.get("finished") is not None:
        return "interrupted", how
    if is_written:
        return "running", "running"
    is_told = session.get("is_told", True)
    return "lost", "ended without a word: killed, or the machine stopped" if is_told else UNTOLD
