"""Curves of one line of text."""

from __future__ import annotations

import sys

import numpy as np

from ..records import Floats

__all__ = ["sparkline"]

BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = "_.-~=+*#"
ZERO, MISSING = "·", " "
NON_FINITE = "!"


def sparkline(values: Floats, width: int = 24, *, decades: float = 1.0) -> str:
    """Return a curve, each character the largest value of its piece.

    Heights are logarithms. Non-finite is `!`, zero `·`, and what was not measured a blank.

    Args:
        values: (T,), of which -inf stands for "not measured".
        width: characters at most.
        decades: that a curve spans at least, so that noise stays flat.
    """
    if not len(values):
        return ""
    pieces = [_piece(v) for v in np.array_split(np.asarray(values, np.float64), min(width, len(values)))]
    plain = not _can_print(BARS + ZERO)
    bars, zero = (PLAIN_BARS, "0") if plain else (BARS, ZERO)
    heights = [_height(p) for p in pieces]
    known = [h for h in heights if h is not None]
    if not known:
        return "".join(_sign(p, zero) for p in pieces)
    low, high = min(known), max(known)
    if high - low < decades:
        middle = (high + low) / 2
        low, high = middle - decades / 2, middle + decades / 2
    return "".join(
        _sign(p, zero) if h is None else bars[round((h - low) / (high - low) * (len(bars) - 1))]
        for p, h in zip(pieces, heights, strict=True)
    )


def _piece(values: Floats) -> float:
    """Return what a piece shows: the non-finite before the largest, the largest before nothing."""
    measured = values[values != -np.inf]
    if not len(measured):
        return -np.inf
    return float(np.nan) if not np.isfinite(measured).all() else float(measured.max())


def _height(value: float) -> float | None:
    return float(np.log10(abs(value))) if np.isfinite(value) and value else None


def _sign(value: float, zero: str) -> str:
    return MISSING if value == -np.inf else zero if value == 0 else NON_FINITE


def _can_print(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
