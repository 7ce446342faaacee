"""Baselines that never contain the present, a rejected or a non-finite value. State in, state out, plain values.

A `Window` is a tuple of floats, oldest first; a streaming baseline is two arrays over paths.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..records import Bools, Floats

__all__ = [
    "HEAD",
    "TAIL",
    "Level",
    "Ordered",
    "Progress",
    "level",
    "median",
    "progress",
    "progress_over",
    "push",
    "stream",
    "stream_over",
]

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
    return _middle(sorted(values))


def level(window: Window, floor: float) -> Level:
    """Return the median and the robust standard deviation (from the MAD), which is at least `floor`."""
    if not window:
        return Level(math.nan, math.nan, 0)
    return Ordered(window).level(floor)


class Ordered:
    """The values of a window in order, kept so while the window moves on: its level costs no sorting."""

    __slots__ = ("values",)

    def __init__(self, window: Window) -> None:
        self.values = sorted(window)

    def replace(self, old: float | None, new: float) -> None:
        """Take one value out, if there is one to take, and another in."""
        if old is not None:
            del self.values[bisect_left(self.values, old)]
        insort(self.values, new)

    @property
    def median(self) -> float:
        return _middle(self.values)

    def level(self, floor: float) -> Level:
        """Return what `level` of the window does."""
        center = _middle(self.values)
        return Level(center, max(MAD_TO_SIGMA * self._spread(center), floor), len(self.values))

    def _spread(self, center: float) -> float:
        """Return the median of the distances from the center: the values left of it and right of it are two ordered
        lists of distances, and a bisection finds how many of each come first."""
        values, n = self.values, len(self.values)
        split = bisect_left(values, center)
        rank = n // 2  # so many distances are no larger than the upper middle one
        low, high = max(0, rank - (n - split)), min(rank, split)
        while low < high:
            left = (low + high) // 2
            if center - values[split - 1 - left] < values[split + rank - left - 1] - center:
                low = left + 1
            else:
                high = left
        left, right = low, rank - low
        above = min(
            center - values[split - 1 - left] if left < split else math.inf,
            values[split + right] - center if split + right < n else math.inf,
        )
        if n % 2:
            return above
        below = max(
            center - values[split - left] if left else 0.0, values[split + right - 1] - center if right else 0.0
        )
        return 0.5 * (below + above)


def _middle(ordered: Sequence[float]) -> float:
    n = len(ordered)
    return ordered[n // 2] if n % 2 else 0.5 * (ordered[n // 2 - 1] + ordered[n // 2])


def stream(past: Floats, value: Floats, decay: float, accept: Bools) -> Floats:
    """Return a running mean over paths, moved where `accept` holds; nan where nothing was accepted yet."""
    fresh = np.where(np.isnan(past), value, decay * past + (1 - decay) * value)
    return np.where(accept, fresh, past)


def stream_over(past: Floats, values: Floats, decay: float, accept: Bools) -> Floats:
    """Return what `stream` leaves after each row of `values` (records, paths) in turn."""
    chosen = accept[0]
    if (accept != chosen).any() or np.isnan(past[chosen]).any():
        for value, accepted in zip(values, accept, strict=True):
            past = stream(past, value, decay, accepted)
        return past
    mean = past[chosen]
    for value in (1 - decay) * values[:, chosen]:
        mean = decay * mean + value
    past = past.copy()
    past[chosen] = mean
    return past


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


def progress_over(past: Progress, losses: Sequence[float], samples: Sequence[int]) -> Progress:
    """Return what `progress` leaves after each of these losses in turn."""
    if len(past.first) < HEAD or past.samples < HEAD_SAMPLES:
        for loss, count in zip(losses, samples, strict=True):
            past = progress(past, loss, count)
        return past
    finite = tuple([loss for loss in losses if math.isfinite(loss)])
    return Progress(past.first, (*past.recent, *finite)[-TAIL:], past.seen + len(finite), past.samples)
