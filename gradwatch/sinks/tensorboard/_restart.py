"""Steps that a resumed run writes again replace those of the run before, and do not stand beside them.

TensorBoard has one word for that: an event which says that the run began anew at a step. Readers then forget what
stands at that step and behind it, whoever wrote it. So it is written where that can cost nobody anything: where all
tags of the log count steps as gradwatch does.
"""

from __future__ import annotations

from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from ._events import events_of

__all__ = ["is_needed", "restart"]

MOST_BYTES = 64 << 20
"""Size of the earlier files up to which they are looked through."""


def restart(step: int) -> Any:
    """Return the event that says that the run began anew at a step."""
    return Event(step=step, session_log=SessionLog(status=SessionLog.START))


def is_needed(folder: str, name: str, step: int) -> bool:
    """Return whether earlier files in a folder hold steps of ours from `step` on, and none of another's that goes by
    another count.

    Args:
        folder: of the log.
        name: our tags begin with it.
        step: that the run goes on from.
    """
    last: dict[str, int] = {}
    for event in events_of(folder, MOST_BYTES) or ():
        for value in event.summary.value:
            last[value.tag] = max(last.get(value.tag, -1), event.step)
    mine = [s for tag, s in last.items() if tag.startswith((f"{name}/", f"{name}_", f"{name} "))]
    others = [s for tag, s in last.items() if not tag.startswith((f"{name}/", f"{name}_", f"{name} "))]
    # A count of samples, or of epochs within the steps written again, goes far beyond, or far behind ours.
    return bool(mine) and max(mine) >= step and all(s <= max(mine) + 1 for s in others)
