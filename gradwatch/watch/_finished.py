"""Asks a statistic for its rows, and makes what goes on record of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..protocols import Statistic
from ..records import FAMILIES, SCALAR
from ..stats import At, View

__all__ = ["asked", "finished"]

Array = NDArray[np.float64]


def asked(statistic: Statistic, view: View, n: int) -> tuple[Tensor | None, Tensor | None]:
    """Return sums and maxima of a view, None for those it does not say; checked for their shape."""
    found = []
    for name, width in (("sums", statistic.num_sums), ("maxima", statistic.num_maxima)):
        value = getattr(statistic, name)(view) if width else None
        if value is not None:
            value = value.detach()
            value = value[:, None] if value.shape == (n,) and width == 1 else value
            if value.shape != (n, width):
                raise ValueError(f"`{name}` gives {n} rows of {width}. Got shape {tuple(value.shape)}")
            if value.is_complex():
                raise TypeError(f"`{name}` gives real numbers. Got {value.dtype}")
        found.append(value)
    return found[0], found[1]


def finished(
    statistic: Statistic, sums: Array, maxima: Array, places: NDArray[np.int64], paths: Sequence[str]
) -> dict[str, float | At]:
    """Return what `finish` makes of merged rows, by name: numbers, and columns at their places.

    Args:
        places: of the rows in the index.
        paths: of the index.

    Raises:
        ValueError: it gives what it has told nobody of, or not one number per row.
    """
    known = {column.name: column for column in statistic.columns()}
    found = statistic.finish(sums, maxima)
    found = found if isinstance(found, Mapping) else {statistic.name: found}
    result: dict[str, float | At] = {}
    for name, value in found.items():
        if name in FAMILIES:
            result |= _family(name, np.asarray(value, np.float64), places, paths)
            continue
        if name not in known:
            raise ValueError(f"it gives {name!r}, which is not among its columns {', '.join(known)}")
        if known[name].kind == SCALAR:
            result[name] = float(value)
        else:
            values = np.asarray(value, np.float64)
            if values.shape != (len(places),):
                raise ValueError(f"`finish` gives one number per row, {len(places)}. Got shape {values.shape}")
            result[name] = At(places, values)
    return result


def _family(name: str, values: Any, places: NDArray[np.int64], paths: Sequence[str]) -> dict[str, float]:
    rows = zip(places.tolist(), values, strict=True)
    return {f"{name}{paths[place]}/{i}": v for place, row in rows for i, v in enumerate(row.tolist()) if not isnan(v)}
