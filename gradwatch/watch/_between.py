"""What was done to gradients between the end of backward and gradwatch's look at them, told from their norms."""

from __future__ import annotations

import math

import numpy as np

from ..records import Floats

__all__ = ["Between", "whole"]

_SAME = 1e-5
_MOST_PARTS = 1024
_ROUNDING = 2e-6
"""Of a ratio of two norms in float32, either way."""


class Between:
    """Tells a clip from what only finishes a gradient.

    Gradients are looked at when backward is over, and again by gradwatch. What lies in between may be a clip, which the
    record is to show the norm before of; or a loss scale taken out, a mean over micro-batches or ranks by hand: then
    the gradient was not complete before. A clip lets no gradient grow, and takes another share of it at every step.

    Attributes:
        writes_show: whether every change so far was seen without reading (see `Seals`); None before the first
            comparison.
    """

    def __init__(self) -> None:
        self._last: tuple[float, float, bool] | None = None
        self.writes_show: bool | None = None

    def compare(self, before: Floats, now: Floats) -> None:
        """Take the norms of gradients that show no sign of a change in between."""
        same = bool(np.allclose(before, now, rtol=_SAME, atol=0, equal_nan=True))
        self.writes_show = self.writes_show is not False and same

    def is_clip(self, before: Floats, now: Floats, *, num_ranks: int = 1) -> bool:
        """Return whether norms of gradients went from `before` to `now` by a clip; both of shape (n,)."""
        large, small = whole(before), whole(now)
        if not math.isfinite(large):
            # A clip by the norm spreads what is not finite: before it, the place is known. What stayed was not clipped.
            return not np.allclose(before, now, rtol=_SAME, atol=0, equal_nan=True)
        if not math.isfinite(small) or small == 0 or math.isclose(large, small, rel_tol=_SAME):
            return False
        if (now > before * (1 + 1e-3)).any() or small > large:
            return False
        ratio = large / small
        is_even = bool(np.allclose(before, ratio * now, rtol=5e-3, atol=1e-6 * large))
        if not is_even:
            return num_ranks == 1  # over ranks it may be a mean that was taken by hand
        verdict = self._is_clip_of_all(large, ratio)
        self._last = large, ratio, verdict
        return verdict

    def _is_clip_of_all(self, norm: float, ratio: float) -> bool:
        exponent = math.log2(ratio)
        if abs(exponent - round(exponent)) < _ROUNDING:
            return False  # a loss scale is a power of two
        if self._last is None:
            return not (ratio < _MOST_PARTS and abs(ratio - round(ratio)) < 3e-6 * ratio)
        last_norm, last_ratio, verdict = self._last
        if math.isclose(norm, last_norm, rel_tol=1e-3):
            return verdict
        return not math.isclose(ratio, last_ratio, rel_tol=1e-6)


def whole(norms: Floats) -> float:
    """Return the norm of all from those of each."""
    largest = float(np.max(norms, initial=0.0))
    if not 0 < largest < np.inf:
        return float(norms.sum())
    return largest * float(np.sqrt(np.sum((norms / largest) ** 2)))
