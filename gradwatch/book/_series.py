"""Synthetic series in Prometheus' notation."""

from __future__ import annotations

import math
import re

from .._text import shown
from ..errors import ConfigError

__all__ = ["MAX_VALUES", "parse_series"]

MAX_VALUES = 100_000
MAX_ITEM = 80
_NUMBER = r"(?:nan|[+-]?(?:inf|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?))"
_ITEM = re.compile(
    rf"^(?P<start>{_NUMBER}|_)(?:(?P<add>[+-](?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?))?(?:x(?P<times>\d+))?$", re.I
)


def parse_series(text: str, where: str = "") -> list[float | None]:
    """Return the values of a series; None where there is none.

    Separated by blanks: `a`, one value; `a+bxn` or `a-bxn`, the n + 1 values a, a + b, ..., a + n b; `axn`, a and n
    times more; `_` no value, `_xn` n of them; `nan`, `inf`, `-inf`.

    Raises:
        ConfigError: with the item that can't be read.
    """
    values: list[float | None] = []
    for item in str(text).split():
        match = _ITEM.match(item) if len(item) <= MAX_ITEM else None
        if match is None or (match["add"] and (match["times"] is None or match["start"] == "_")):
            at = where + ": " if where else ""
            raise ConfigError(f"{at}{shown(item)} is no part of a series. Known are 1.5, 0+0.1x20, 3x20, _ and nan.")
        times = int(match["times"] or 0)
        if times + len(values) > MAX_VALUES:
            raise ConfigError(f"{where + ': ' if where else ''}a series has at most {MAX_VALUES} values.")
        if match["start"] == "_":
            values += [None] * (times or 1)
            continue
        start, add = float(match["start"]), float(match["add"] or 0)
        values += [start + i * add if add and math.isfinite(start) else start for i in range(times + 1)]
    if not values:
        raise ConfigError(f"{where + ': ' if where else ''}a series needs at least one value.")
    return values
