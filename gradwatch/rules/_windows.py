"""Baselines that never contain the present, a rejected or a non-finite value. State in, state out, plain values.

A `Window` is a tuple of floats, oldest first; a streaming baseline is two arrays over paths.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..records import Bools, Floats

__all__ = ["HEAD", "TAIL", "Level", "Progress", "level", "median", "progress", "push", "stream"]

HEAD = 5
HEAD_SAMPLES = 64
TAIL = 50
MAD_TO_SIGMA = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution."""

Window = tuple[float, ...]


class Level(NamedTuple):
    """Where a window lies and how wide it is."""

    center: float
    sigma: float
    size: int


def push(window: Window, value: float, size: int) -> Window:
    """Return the window with one more value; a non-finite one leaves it as it is."""
    return (*window[-(size - 1) :], value) if math.isfinite(value) else window


def median(values: Window) -> float:
    """Return the median; nan of nothing."""
    n = len(values)
    if not n:
        return math.nan
    ordered = sorted(values)
    return ordered[n // 2] if n % 2 else 0.5 * (ordered[n // 2 - 1] + ordered[n // 2])


def level(window: Window, floor: float) -> Level:
    """Return the median and the robust standard deviation (from the MAD), which is at least `floor`."""
    center = median(window)
    spread = median(tuple([abs(v - center) for v in window]))
    return Level(center, max(MAD_TO_SIGMA * spread, floor) if window else math.nan, len(window))


def stream(past: Floats, value: Floats, decay: float, accept: Bools) -> Floats:
    """Return a running mean over paths, moved where `accept` holds; nan where nothing was accepted yet."""
    fresh = np.where(np.isnan(past), value, decay * past + (1 - decay) * value)
    return np.where(accept, fresh, past)


class Progress(NamedTuple):
    """What is remembered of the loss, to say whether it improves.

    Attributes:
        first: the first finite losses: `HEAD` of them, more where batches are small: those of `HEAD_SAMPLES` samples.
        recent: the last finite losses, at most `TAIL`.
        seen: finite losses so far.
        samples: that the first losses are of.
    """

    first: Window = ()
    recent: Window = ()
    seen: int = 0
    samples: int = 0

    @property
    def start(self) -> float:
        """Level at the beginning: the median of the first losses; nan before there are any.

        The very first one where the others are five times as large: a step that blew up is no level to improve on. Not
        where losses differ as much at any time: in batches of one the first is a draw like the others.
        """
        level = median(self.first)
        if not (self.first and level > 5 * self.first[0] > 0):
            return level
        ordered = sorted(self.recent)
        quiet = ordered[3 * len(ordered) // 4] < 3 * ordered[len(ordered) // 4]
        return self.first[0] if quiet else level

    @property
    def now(self) -> float:
        """Level of the last losses: fifty, or the later half while there are fewer than a hundred."""
        return median(self.recent[-max(10, min(TAIL, self.seen // 2)) :])

    def is_stuck(self, share: float, after: int = 100) -> bool:
        """Return whether the loss fell by less than `share` of its first level; False while that can't be said.

        A loss that was never given is never stuck: rules that ask are then silent.
        """
        if self.seen < after:
            return False
        return self.start - self.now < share * abs(self.start)


def progress(past: Progress, loss: float, samples: int = 0) -> Progress:
    """Return what is remembered of the loss after one more; a non-finite loss leaves it as it is.

    Args:
        past: what was remembered.
        loss: the next one.
        samples: that it is the mean of; 0 where unknown, which counts as many.
    """
    if not math.isfinite(loss):
        return past
    first, counted = past.first, past.samples
    if len(first) < HEAD or counted < HEAD_SAMPLES:
        first, counted = (*first, loss), counted + (samples or HEAD_SAMPLES)
    return Progress(first, push(past.recent, loss, TAIL), past.seen + 1, counted)
