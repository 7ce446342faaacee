"""Whether a block is what its header says: whoever wrote it, reading it further raises nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...records import NUM_BINS
from ._block import Block, unpack_bits
from ._encode import FLOATS, INTEGERS
from ._scan import UNREADABLE

__all__ = ["is_sound"]


def is_sound(block: Block, length: int | None) -> bool:
    """Return whether every array has the shape, type and range that the header asks for.

    Args:
        block: that was read.
        length: number of paths in its index; None: not known, and left open.
    """
    try:
        return (
            _header(block.header) and _records(block) and _scalars(block) and _columns(block, length) and _bins(block)
        )
    except UNREADABLE:
        return False


def _header(header: Mapping[str, Any]) -> bool:
    counts = all(type(header[name]) is int and header[name] >= 0 for name in ("index", "count", "thinned"))
    names = all(_are(header[name], str) for name in ("scalars", "columns", "histogram_paths"))
    return counts and names and _treatments(header) and _unseen(header)


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _treatments(header: Mapping[str, Any]) -> bool:
    for i, name, rule, before, after, applied, values in header["treatments"]:
        if type(i) is not int or not 0 <= i < header["count"] or not _are([name, rule], str):
            return False
        if not isinstance(applied, bool) or not isinstance(values, dict):
            return False
        for number in (before, after, *values.values()):
            float(number)
    return True


def _unseen(header: Mapping[str, Any]) -> bool:
    for first, last, unseen in header.get("unseen", []):
        if not (type(first) is type(last) is int and 0 <= first <= last < header["count"] and isinstance(unseen, dict)):
            return False
    return True


def _has(block: Block, name: str, dtype: str, *shape: int) -> bool:
    array = block.arrays.get(name)
    return array is not None and array.dtype.str == dtype and array.shape == shape


def _records(block: Block) -> bool:
    count = len(block)
    integers = all(_has(block, name, "<i8", count) for name in INTEGERS)
    floats = all(_has(block, name, "<f8", count) for name in FLOATS)
    numbers = "number" not in block.arrays or _has(block, "number", "<i8", count)
    return integers and floats and numbers and _has(block, "flags", "|u1", count)


def _scalars(block: Block) -> bool:
    k, count = len(block.header["scalars"]), len(block)
    return not k or (_has(block, "scalars", "<f8", k, count) and _has(block, "scalars.rows", "|u1", k, _bytes(count)))


def _columns(block: Block, length: int | None) -> bool:
    return all(_column(block, f"c{i}.", length) for i in range(len(block.header["columns"])))


def _column(block: Block, prefix: str, length: int | None) -> bool:
    arrays, count = block.arrays, len(block)
    if not _has(block, prefix + "rows", "|u1", _bytes(count)):
        return False
    num_rows = _num_set(arrays[prefix + "rows"], count)
    masks, masked = arrays.get(prefix + "masks"), arrays.get(prefix + "masked")
    if masked is not None and not (
        masks is not None
        and _has(block, prefix + "masked", "|u1", _bytes(count))
        and masks.dtype.str == "|u1"
        and masks.ndim == 2
        and len(masks) in (1, _num_set(masked, count))
        and (length is None or masks.shape[1] == _bytes(length))
    ):
        return False
    values = arrays.get(prefix + "values")
    if values is None:
        return not num_rows
    return _values(block, prefix, values, num_rows, length)


def _values(block: Block, prefix: str, values: NDArray[Any], num_rows: int, length: int | None) -> bool:
    if values.dtype.str not in ("<f4", "<f8") or values.ndim != 2 or len(values) != num_rows:
        return False
    support = block.arrays.get(prefix + "support")
    if support is None:
        return length is None or values.shape[1] == length
    if not _has(block, prefix + "fill", "<f8", 1) or support.dtype.str != "|u1" or support.ndim != 1:
        return False
    if length is None:
        return True
    return len(support) == _bytes(length) and values.shape[1] == _num_set(support, length)


def _bins(block: Block) -> bool:
    arrays = block.arrays
    if "h.record" not in arrays:
        return True
    m, entries = len(arrays["h.record"]), len(arrays["h.bin"])
    shapes = (
        _has(block, "h.record", "<i4", m)
        and _has(block, "h.path", "<i4", m)
        and _has(block, "h.start", "<i8", m + 1)
        and _has(block, "h.bin", "<u2", entries)
        and _has(block, "h.count", "<i8", entries)
    )
    if not shapes:
        return False
    start = arrays["h.start"]

    def within(name: str, end: int) -> bool:
        return bool(((arrays[name] >= 0) & (arrays[name] < end)).all())

    ordered = bool((np.diff(start) >= 0).all()) and int(start[0]) >= 0 and int(start[-1]) <= entries
    places = within("h.record", len(block)) and within("h.path", len(block.header["histogram_paths"]))
    return ordered and places and within("h.bin", NUM_BINS)


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _num_set(packed: NDArray[np.uint8], count: int) -> int:
    return int(unpack_bits(packed, count).sum())
