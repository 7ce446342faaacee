"""Records -> block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...records import Bools, Floats, HistogramTable, StepRecord
from ._block import Block, pack_bits

__all__ = ["FLOATS", "INTEGERS", "encode", "superseded"]

INTEGERS = ("step", "epoch", "batch_idx", "num_samples")
FLOATS = ("time", "loss", "lr", "global_norm", "global_norm_after")


def encode(
    records: Sequence[StepRecord], *, index: int = 0, numbers: Sequence[int] = (), thinned: int = 0, gap: Any = None
) -> Block:
    """Return records of one index as a block.

    Args:
        records: one at least.
        index: the number of the index file.
        numbers: of the records, counted in their session; none where nobody counts.
        thinned: whether some of the records were thinned before.
        gap: what is to be told of records that are missing before these.
    """
    arrays: dict[str, NDArray[Any]] = {}
    if numbers:
        arrays["number"] = np.array(numbers, "<i8")
    for name in INTEGERS:
        arrays[name] = np.array([getattr(r, name) for r in records], "<i8")
    for name in FLOATS:
        arrays[name] = np.array([getattr(r, name) for r in records], "<f8")
    arrays["flags"] = np.array([r.has_loss + 2 * r.skipped + 4 * (not r.has_gradient) for r in records], np.uint8)
    header: dict[str, Any] = {
        "index": index,
        "count": len(records),
        "thinned": thinned,
        "scalars": _encode_scalars(records, arrays),
        "columns": _encode_columns(records, arrays),
        "treatments": [
            [i, t.name, t.rule, float(t.before), float(t.after), bool(t.applied), _floats(t.values)]
            for i, r in enumerate(records)
            for t in r.treatments
        ],
        "histogram_paths": _encode_histograms(records, arrays),
    }
    unseen = [[i, dict(r.unseen)] for i, r in enumerate(records) if r.unseen]
    if unseen:
        header["unseen"] = _runs_of_equals(unseen)
    if gap is not None:
        header["gap"] = gap
    return Block(header, arrays)


def superseded(first: int, last: int) -> Block:
    """Return a block of no record, which stands for those of these numbers: a later session has written their steps."""
    block = encode([], numbers=[])
    return Block({**block.header, "superseded": [first, last]}, block.arrays)


def _runs_of_equals(rows: list[list[Any]]) -> list[list[Any]]:
    """Return [first, last, mapping] for each run of records that leave the same unseen for the same reasons."""
    runs: list[list[Any]] = []
    for i, unseen in rows:
        if runs and runs[-1][1] == i - 1 and runs[-1][2] == unseen:
            runs[-1][1] = i
        else:
            runs.append([i, i, unseen])
    return runs


def _floats(values: Any) -> dict[str, float]:
    return {k: float(v) for k, v in values.items()}


def _names(mappings: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _encode_scalars(records: Sequence[StepRecord], arrays: dict[str, NDArray[Any]]) -> list[str]:
    names = _names([r.scalars for r in records])
    if names:
        arrays["scalars"] = np.array([[r.scalars.get(n, 0.0) for r in records] for n in names], "<f8")
        arrays["scalars.rows"] = pack_bits([[n in r.scalars for r in records] for n in names])
    return names


def _encode_columns(records: Sequence[StepRecord], arrays: dict[str, NDArray[Any]]) -> list[str]:
    names = _names([m for r in records for m in (r.columns, r.masks)])
    for i, name in enumerate(names):
        _encode_column(f"c{i}.", name, records, arrays)
    return names


def _encode_column(prefix: str, name: str, records: Sequence[StepRecord], arrays: dict[str, NDArray[Any]]) -> None:
    rows = [name in r.columns for r in records]
    masked = [name in r.masks for r in records]
    arrays[prefix + "rows"] = pack_bits(rows)
    support: Bools = np.ones(len(records[0].index), np.bool_)
    if any(masked):
        masks = [r.masks[name] for r in records if name in r.masks]
        same = all(m is masks[0] or np.array_equal(m, masks[0]) for m in masks)
        stacked = np.asarray(masks[:1] if same else masks, np.bool_)
        arrays[prefix + "masked"] = pack_bits(masked)
        arrays[prefix + "masks"] = pack_bits(stacked)
        if masked == rows:
            support = np.asarray(stacked.any(axis=0))
    if not any(rows):
        return
    values = np.array([r.columns[name] for r in records if name in r.columns], np.float64)
    outside = np.ascontiguousarray(values[:, ~support]).view(np.int64)
    # What stands at paths that were never measured is one number throughout, normally 0: kept once.
    if outside.size and (outside == outside.flat[0]).all():
        arrays[prefix + "support"] = pack_bits(support)
        arrays[prefix + "fill"] = outside.view(np.float64).ravel()[:1].copy()
        values = values[:, support]
    arrays[prefix + "values"] = _narrowed(values)


def _narrowed(values: Floats) -> NDArray[Any]:
    """Return the values in float32 where that loses nothing."""
    with np.errstate(all="ignore"):
        small = values.astype("<f4")
        lossless = bool(((small == values) | np.isnan(values)).all())
    return small if lossless else values


def _encode_histograms(records: Sequence[StepRecord], arrays: dict[str, NDArray[Any]]) -> list[str]:
    paths = _names([r.histograms for r in records])
    if not paths:
        return paths
    places = {p: i for i, p in enumerate(paths)}
    tables = [HistogramTable.of(r.histograms) for r in records]
    sizes = [len(table) for table in tables]
    arrays["h.record"] = np.repeat(np.arange(len(tables), dtype="<i4"), sizes)
    arrays["h.path"] = np.array([places[p] for table in tables for p in table], "<i4")
    lengths = np.concatenate([np.diff(table.starts) for table in tables])
    arrays["h.start"] = np.concatenate([[0], lengths.cumsum()]).astype("<i8")
    arrays["h.bin"] = np.concatenate([table.bins for table in tables]).astype("<u2")
    arrays["h.count"] = np.concatenate([table.counts.astype("<i8") for table in tables])
    return paths
