"""The life of an alert, for all paths of a rule at once: inactive -> pending -> firing -> resolved.

Semantics of Prometheus' alerting rules (`for`, `keep_firing_for`), with seconds turned into optimizer steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..records import Bools, Floats

__all__ = ["Life", "advance"]


class Life(NamedTuple):
    """Where each path stands; the last place is the whole model.

    Attributes:
        since: step of the first of the true judgements running; nan where the last one was not true.
        count: true judgements running.
        last: step of the last true judgement.
        firing: the alert is on.
    """

    since: Floats
    count: Any
    last: Floats
    firing: Bools

    @classmethod
    def inactive(cls, n: int) -> Life:
        never = np.full((2, n + 1), np.nan)
        return cls(never[0], np.zeros(n + 1, np.int64), never[1], np.zeros(n + 1, np.bool_))


def advance(
    life: Life | None,
    positions: Any,
    judged: Bools | bool,
    *,
    n: int,
    step: int,
    for_steps: int,
    keep_firing_for: int,
) -> Life | None:
    """Return the lives after one judgement; None while every path is inactive.

    Args:
        life: before.
        positions: where the condition holds.
        judged: which paths were judged (n,), or all, or none. A path that was not judged stays as it is.
        n: paths of the index.
        step: of the record.
        for_steps: steps from the first to the last true judgement, both included, before it fires; above 1, it takes
            two judgements at least.
        keep_firing_for: steps it stays firing after the last true judgement.
    """
    if not len(positions) and (life is None or judged is False):
        return life
    life = Life.inactive(n) if life is None else life
    now = np.zeros(n + 1, np.bool_)
    now[positions] = True
    if isinstance(judged, np.ndarray):
        # A rule that judges paths gives no verdict on the whole model but by firing.
        cleared = ~now
        cleared[:n] &= judged
    else:
        cleared = ~now if judged else np.zeros(n + 1, np.bool_)
    since = np.where(now & np.isnan(life.since), step, life.since)
    count = np.where(now, life.count + 1, np.where(cleared, 0, life.count))
    last = np.where(now, step, life.last)
    since = np.where(cleared, np.nan, since)
    old_enough = now & (step - since + 1 >= for_steps) & (count >= (2 if for_steps > 1 else 1))
    over = cleared & ~(step - life.last <= keep_firing_for)
    # A firing path whose condition comes back within `keep_firing_for` never stopped firing.
    firing = (life.firing & ~over) | old_enough
    if not now.any() and not firing.any() and not count.any():
        return None
    return Life(since, count, last, firing)
