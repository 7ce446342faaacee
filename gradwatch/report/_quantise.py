"""Tables as few bytes: pooled in time, sizes on a logarithmic scale of 8 or 16 bits, deflated, base64.

Codes: 0 not measured, 1 zero, 2 nan, 3 infinite, from 4 on the sizes between `low` and `high` (log10).
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorboard_plugin_gradwatch import MISSING, magnitudes, pool, ridge

from ._data import Table

__all__ = ["decode_table", "encode_histograms", "encode_table", "encode_tables", "squeeze"]

FIRST = 4
FEWEST = 12
"""Points in time that a table keeps however little room there is."""


def squeeze(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 7)).decode("ascii")


def encode_table(table: Table, rows: NDArray[np.int64], columns: int, bits: int) -> dict[str, Any]:
    """Return a table over some of the paths, as plain values."""
    steps, values = pool(table.steps, table.values[:, rows], columns)
    sizes = values[np.isfinite(values) & (values > 0)].astype(np.float64)
    low, high = (float(np.log10(sizes.min())), float(np.log10(sizes.max()))) if len(sizes) else (0.0, 1.0)
    top = 2**bits - 1
    scale = (top - FIRST) / (high - low) if high > low else 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint((np.log10(values.astype(np.float64)) - low) * scale) + FIRST
    codes = np.where(values == 0, 1, codes)
    codes = np.where(np.isnan(values), 2, codes)
    codes = np.where(np.isposinf(values), 3, codes)
    codes = np.where(values == MISSING, 0, codes)
    # Row after row in time: neighbours are alike, which is what the compression lives on.
    data = np.ascontiguousarray(codes.T).astype("<u1" if bits == 8 else "<u2").tobytes()
    return {
        "steps": steps.astype(np.int64).tolist(),
        "rows": len(rows),
        "bits": bits,
        "low": low,
        "high": high,
        "last": table.last,
        "measured": table.measured,
        "data": squeeze(data),
    }


def decode_table(packed: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return the values (T, N) of what `encode_table` made: within half a code of the truth."""
    kind = "<u1" if packed["bits"] == 8 else "<u2"
    codes = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), kind).astype(np.float64)
    codes = codes.reshape(packed["rows"], len(packed["steps"])).T
    span = (packed["high"] - packed["low"]) / (2 ** packed["bits"] - 1 - FIRST)
    values = 10.0 ** (packed["low"] + (codes - FIRST) * span)
    return np.select([codes == 0, codes == 1, codes == 2, codes == 3], [MISSING, 0.0, np.nan, np.inf], values)


def encode_tables(tables: Sequence[tuple[str, Table, NDArray[np.int64]]], budget: int) -> dict[str, dict[str, Any]]:
    """Return as fine a copy of each table as the budget of bytes allows. The first gets half, and what is left."""
    packed: dict[str, dict[str, Any]] = {}
    share = budget // 2
    for left, (name, table, rows) in zip(range(len(tables) - 1, 0, -1), reversed(tables[1:]), strict=False):
        packed[name] = _fit(table, rows, share // left)
        share = max(0, share - len(packed[name]["data"]))
    if tables:
        name, table, rows = tables[0]
        packed[name] = _fit(table, rows, budget - sum(len(p["data"]) for p in packed.values()))
    return {name: packed[name] for name, _, _ in tables}


def _fit(table: Table, rows: NDArray[np.int64], share: int) -> dict[str, Any]:
    """Return the finest copy of a table that takes at most `share` bytes, or else the coarsest there is."""
    num_steps = len(table.steps)
    for bits in (16, 8):
        if len(rows) * num_steps * bits // 8 <= 3 * share:  # else far too large, however well it compresses
            packed = encode_table(table, rows, num_steps, bits)
            if len(packed["data"]) <= share:
                return packed
    columns = FEWEST
    best = packed = encode_table(table, rows, columns, 8)
    for _ in range(3):  # bytes grow with the number of columns, though not quite in proportion
        columns = max(FEWEST, min(num_steps, int(0.97 * columns * share / max(1, len(packed["data"])))))
        packed = encode_table(table, rows, columns, 8)
        if len(best["data"]) < len(packed["data"]) <= share:
            best = packed
    return best


def encode_histograms(
    histograms: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]], first: Iterable[str], budget: int
) -> dict[str, Any]:
    """Return histograms over time as plain values: those of `first` always, the others where there is room.

    Counts become 255 times the root of their share, so that the tails are still seen.
    """
    wanted = [p for p in first if p in histograms]
    everything = [*wanted, *(p for p in histograms if p not in set(wanted))]
    packed = _pack_histograms(histograms, [], 1)
    for paths, most in (
        (everything, 24),
        (everything, 12),
        (everything, 6),
        (everything[:200], 8),
        (everything[:60], 8),
    ):
        packed = _pack_histograms(histograms, paths, most)
        if len(packed["data"]) <= budget:
            return packed
    return _pack_histograms(histograms, wanted[:20], 8)


def _pack_histograms(
    histograms: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]], paths: Iterable[str], most: int
) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    parts: list[bytes] = []
    offset, width = 0, 0.0
    for path in paths:
        steps, counts = histograms[path]
        rows = ((int(s), *magnitudes(c)) for s, c in zip(steps, counts, strict=True))
        when, matrix, header = ridge(rows, most)
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1.0)
        codes = np.ceil(255 * np.sqrt(shares)).astype("<u1")
        entries[path] = [offset, header["left"], codes.shape[1], when.astype(np.int64).tolist()]
        parts.append(np.ascontiguousarray(codes.T).tobytes())
        offset, width = offset + codes.size, header["width"]
    return {"paths": entries, "width": width, "data": squeeze(b"".join(parts))}
