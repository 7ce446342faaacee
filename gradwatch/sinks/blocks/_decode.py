"""Block -> records, columns, scalars, histograms; and a thinner block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...records import NUM_BINS, Bools, Floats, HistogramTable, Index, StepRecord, TreatmentReport
from ._block import Block, pack_bits, unpack_bits

__all__ = ["bare", "column", "histograms", "measured", "records", "scalar", "thin"]


def scalar(block: Block, name: str) -> tuple[Bools, Floats]:
    """Return which records have the scalar (T,), and its values for those."""
    names = block.header["scalars"]
    if name not in names:
        return np.zeros(len(block), np.bool_), np.zeros(0)
    i = names.index(name)
    rows = unpack_bits(block.arrays["scalars.rows"], len(block))[i]
    return rows, block.arrays["scalars"][i][rows].astype(np.float64)


def column_rows(block: Block, name: str) -> Bools:
    """Return which records have the column, shape (T,)."""
    names = block.header["columns"]
    if name not in names:
        return np.zeros(len(block), np.bool_)
    return unpack_bits(block.arrays[f"c{names.index(name)}.rows"], len(block))


def column(block: Block, name: str, length: int) -> tuple[Bools, Floats]:
    """Return which records have the column (T,), and its values (rows, length) for those.

    Args:
        block: that was read.
        name: of the column.
        length: number of paths in the block's index.
    """
    rows = column_rows(block, name)
    if not rows.any():
        return rows, np.zeros((0, length))
    prefix = f"c{block.header['columns'].index(name)}."
    values = block.arrays[prefix + "values"].astype(np.float64)
    if prefix + "support" in block.arrays:
        support = unpack_bits(block.arrays[prefix + "support"], length)
        whole = np.full((len(values), length), block.arrays[prefix + "fill"][0])
        whole[:, support] = values
        values = whole
    return rows, values


def masks(block: Block, name: str, length: int) -> tuple[Bools, Bools]:
    """Return which records have a mask for the column (T,), and the masks (masked, length) of those."""
    names = block.header["columns"]
    prefix = f"c{names.index(name)}." if name in names else ""
    if prefix + "masked" not in block.arrays:
        return np.zeros(len(block), np.bool_), np.zeros((0, length), np.bool_)
    masked = unpack_bits(block.arrays[prefix + "masked"], len(block))
    stored = unpack_bits(block.arrays[prefix + "masks"], length)
    return masked, np.broadcast_to(stored, (int(masked.sum()), length)) if len(stored) == 1 else stored


def measured(block: Block, name: str, length: int) -> Bools:
    """Return which entries of `column(block, name, length)` are measurements, shape (rows, length)."""
    rows = column_rows(block, name)
    masked, stored = masks(block, name, length)
    known = np.ones((int(rows.sum()), length), np.bool_)
    known[masked[rows]] = stored[rows[masked]]
    return known


def histograms(block: Block) -> Iterator[tuple[int, str, NDArray[np.int64]]]:
    """Yield `(record, path, counts (512,))` of every histogram."""
    paths, arrays = block.header["histogram_paths"], block.arrays
    if "h.record" not in arrays:
        return
    start = arrays["h.start"]
    for i, (record, path) in enumerate(zip(arrays["h.record"].tolist(), arrays["h.path"].tolist(), strict=True)):
        counts = np.zeros(NUM_BINS, np.int64)
        part = slice(int(start[i]), int(start[i + 1]))
        counts[arrays["h.bin"][part]] = arrays["h.count"][part]
        yield record, paths[path], counts


def records(block: Block, index: Index) -> list[StepRecord]:
    """Return the records as they were written."""
    rows: list[dict[str, Any]] = [
        {"columns": {}, "masks": {}, "scalars": {}, "histograms": {}, "treatments": []} for _ in range(len(block))
    ]
    for name in block.header["scalars"]:
        present, values = scalar(block, name)
        for i, value in zip(np.flatnonzero(present).tolist(), values.tolist(), strict=True):
            rows[i]["scalars"][name] = value
    for name in block.header["columns"]:
        for key, (present, stored) in (
            ("columns", column(block, name, len(index))),
            ("masks", masks(block, name, len(index))),
        ):
            for i, row in zip(np.flatnonzero(present).tolist(), stored, strict=True):
                rows[i][key][name] = row
    for first, last, unseen in block.header.get("unseen", ()):
        for i in range(first, last + 1):
            rows[i]["unseen"] = {str(k): str(v) for k, v in unseen.items()}
    for i, entries in groupby(histograms(block), key=itemgetter(0)):
        found = {path: counts for _, path, counts in entries}
        rows[i]["histograms"] = HistogramTable(list(found), np.stack(list(found.values())))
    for i, name, rule, before, after, applied, values in block.header["treatments"]:
        rows[i]["treatments"].append(
            TreatmentReport(
                name=name,
                rule=rule,
                before=float(before),
                after=float(after),
                applied=applied,
                values={k: float(v) for k, v in values.items()},
            )
        )
    plain = {
        name: block.arrays[name].tolist()
        for name in ("step", "epoch", "batch_idx", "num_samples", "time", "loss", "lr", "global_norm")
    } | {"global_norm_after": block.arrays["global_norm_after"].tolist()}
    flags = block.arrays["flags"].tolist()
    return [
        StepRecord(
            index=index,
            has_loss=bool(flags[i] & 1),
            skipped=bool(flags[i] & 2),
            has_gradient=not flags[i] & 4,
            treatments=tuple(row.pop("treatments")),
            **{name: values[i] for name, values in plain.items()},
            **row,
        )
        for i, row in enumerate(rows)
    ]


def bare(block: Block) -> Block:
    """Return the block without what runs over paths, for one whose index is gone."""
    arrays = {name: array for name, array in block.arrays.items() if not re.match(r"c\d+\.|h\.", name)}
    return Block({**block.header, "columns": [], "histogram_paths": []}, arrays)


def thin(block: Block, seen: dict[str, int], telling: Bools | None = None) -> Block:
    """Return the block without every second row of each column and every second set of histograms.

    Args:
        block: that was read.
        seen: rows of each column met so far, brought up to date: the count runs on from block to block, so that
            blocks of a single record are thinned too.
        telling: records whose rows are kept, shape (T,); they count for nothing.
    """
    spared = np.zeros(len(block), np.bool_) if telling is None else telling
    arrays, count = dict(block.arrays), len(block)
    for i, name in enumerate(block.header["columns"]):
        prefix = f"c{i}."
        rows = unpack_bits(arrays[prefix + "rows"], count)
        keep = spared[rows].copy()
        others = seen.get(name, 0) + np.arange(int((~keep).sum()))
        keep[~keep] = others % 2 == 0
        seen[name] = seen.get(name, 0) + len(others)
        kept = np.zeros(count, np.bool_)
        kept[np.flatnonzero(rows)[keep]] = True
        arrays[prefix + "rows"] = pack_bits(kept)
        if prefix + "values" in arrays:
            arrays[prefix + "values"] = arrays[prefix + "values"][keep]
        if prefix + "masked" in arrays:
            masked = unpack_bits(arrays[prefix + "masked"], count)
            if len(arrays[prefix + "masks"]) > 1:
                arrays[prefix + "masks"] = arrays[prefix + "masks"][kept[masked]]
            arrays[prefix + "masked"] = pack_bits(masked & kept)
    _thin_histograms(arrays, seen)
    return Block({**block.header, "thinned": int(block.header["thinned"]) + 1}, arrays)


def _thin_histograms(arrays: dict[str, NDArray[Any]], seen: dict[str, int]) -> None:
    if "h.record" not in arrays:
        return
    owners, first = np.unique(arrays["h.record"], return_inverse=True)
    keep = ((seen.get("/histograms", 0) + np.arange(len(owners))) % 2 == 0)[first]
    seen["/histograms"] = seen.get("/histograms", 0) + len(owners)
    sizes = np.diff(arrays["h.start"])
    entries = np.repeat(keep, sizes)
    arrays["h.start"] = np.concatenate([[0], np.cumsum(sizes[keep])]).astype("<i8")
    for name in ("h.record", "h.path"):
        arrays[name] = arrays[name][keep]
    for name in ("h.bin", "h.count"):
        arrays[name] = arrays[name][entries]
