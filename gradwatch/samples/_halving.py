"""The samples that carry most of a gradient, found by backward passes of ever smaller groups."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["halve"]

NUM_PASSES = 12
"""Backward passes at most: with those of the batch itself less than ten steps' worth."""


def halve(
    project: Callable[[NDArray[np.bool_]], tuple[float, float]], whole: float, size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return projections and norms of the few samples that carry most of a gradient; NaN of all others.

    The group with the largest projection is halved, again and again: projections add up, so that one backward tells of
    both halves. Large contributions of opposite signs in one group may hide each other.

    Args:
        project: returns projection and norm of the gradient of some samples (a mask of shape (B,)).
        whole: the projection of all.
        size: B.
    """
    dots, norms = np.full(size, np.nan), np.full(size, np.nan)
    groups = [(-abs(whole), 0, size, whole)]
    for _ in range(NUM_PASSES):
        while groups and groups[0][2] - groups[0][1] == 1:
            heapq.heappop(groups)
        if not groups:
            break
        _, start, stop, dot = heapq.heappop(groups)
        middle = (start + stop) // 2
        left, norm = project((np.arange(size) >= start) & (np.arange(size) < middle))
        for low, high, value in ((start, middle, left), (middle, stop, dot - left)):
            heapq.heappush(groups, (-abs(value), low, high, value))
            if high - low == 1:
                dots[low] = value
        if middle - start == 1:
            norms[start] = norm
    first = int(np.nanargmax(np.abs(dots)))
    if np.isnan(norms[first]):
        norms[first] = project(np.arange(size) == first)[1]
    return dots, norms
