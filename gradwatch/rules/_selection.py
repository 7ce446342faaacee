"""Which paths a rule looks at, and which of them comes first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..records import Bools, Index

__all__ = ["first_in_order", "leaf_first", "select"]

_CACHE: WeakKeyDictionary[Index, dict[Any, Bools]] = WeakKeyDictionary()


def select(index: Index, paths: Sequence[str], kind: str = "parameter", min_ndim: int = 0) -> Bools:
    """Return which paths a rule looks at: trainable parameters of the optimizer that hold any element, or modules, that
    match `paths`.

    Args:
        paths: glob patterns.
        kind: "parameter", "module" or "any".
        min_ndim: parameters of fewer dimensions are left out: a bias before a normalisation has gradient zero.
    """
    cache = _CACHE.setdefault(index, {})
    key = (tuple(paths), kind, min_ndim)
    if key not in cache:
        chosen = index.select(tuple(paths))
        if kind == "parameter":
            chosen = chosen & index.is_parameter & index.trainable & index.in_optimizer & (index.ndim >= min_ndim)
            chosen &= index.numel > 0
        elif kind == "module":
            chosen = chosen & index.is_module
        cache[key] = chosen
    return cache[key]


def first_in_order(index: Index, positions: Any, order: str) -> str:
    """Return the first of the paths in "forward" or "backward" order; "" for none but the whole model."""
    positions = positions[positions < len(index)]
    if not len(positions):
        return ""
    if order == "given":
        return index.paths[int(positions[0])]
    depth = index.depth[positions]
    nearest = positions[depth == (depth.max() if order == "backward" else depth.min())]
    return index.paths[int(nearest[-1] if order == "backward" else nearest[0])]


def leaf_first(index: Index, positions: Any) -> str:
    """Return the first path in forward order, and of modules within each other the innermost.

    A container begins before its children and ends after them: what was born in a child shows in both.
    """
    first = first_in_order(index, positions, "forward")
    while first:
        inner = np.array([p for p in positions.tolist() if index.paths[p].startswith(first + ".")], np.int64)
        if not len(inner):
            break
        first = first_in_order(index, inner, "forward")
    return first
