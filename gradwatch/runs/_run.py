"""A run folder, read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RunFormatError, UnknownNameError
from ..records import Bools, Floats, Incident, Index, StepRecord
from ..sinks import blocks
from ._folder import BlockFile, Live, read_incidents, read_index, read_meta, record_files

__all__ = ["Run", "find_runs", "read_run"]

SINGLE = ("loss", "lr", "global_norm", "global_norm_after", "time", "epoch", "batch_idx", "num_samples", "skipped")


class Run:
    """What a `RunFolder` wrote. Read as far as it is needed, and it may still be growing: see `refresh`.

    Attributes:
        path: the folder.
        meta: what `meta.json` says: `name`, `model`, `started`, `versions`, `options`, `sessions`, ...
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.meta = read_meta(self.path)
        self._files: dict[Path, BlockFile] = {}
        self._indices: dict[int, Index] = {}

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {len(self)} records)"

    def __len__(self) -> int:
        """Number of records."""
        return sum(int(live.rows.sum()) for live in self._live)

    def refresh(self) -> bool:
        """Look for what was written since; return whether there is anything new."""
        before = self._signature()
        self.meta = read_meta(self.path)
        for name in ("_live", "incidents"):
            self.__dict__.pop(name, None)
        return self._signature() != before

    @cached_property
    def incidents(self) -> list[Incident]:
        """The last known state of every incident, in the order they began."""
        return read_incidents(self.path, self._starts())

    @property
    def index(self) -> Index:
        """The newest index. Empty where nothing was recorded."""
        return self._index(self._live[-1].block) if self._live else Index.of_parameters(())

    @property
    def columns(self) -> list[str]:
        """Names of all columns that were measured at least once, in the order they appeared."""
        return list(dict.fromkeys(name for live in self._live for name in live.block.header["columns"]))

    @property
    def scalars(self) -> list[str]:
        """Names of all scalars, those that every record has first."""
        found = dict.fromkeys(name for live in self._live for name in live.block.header["scalars"])
        return [*SINGLE, *found]

    @property
    def thinned(self) -> bool:
        """Columns of some steps were dropped, to keep the folder below its limit."""
        return any(live.block.header["thinned"] for live in self._live)

    @property
    def summary(self) -> str:
        """The words said at the end; "" where there are none."""
        file = self.path / "summary.md"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def records(self) -> Iterator[StepRecord]:
        """Yield every record as it was written, in order."""
        for live in self._live:
            for record, keep in zip(blocks.records(live.block, self._index(live.block)), live.rows, strict=True):
                if keep:
                    yield record

    def steps(self, column: str | None = None) -> NDArray[np.int64]:
        """Return the steps at which the column was measured; of all records without one."""
        if column is None:
            return _joined([live.block.steps[live.rows] for live in self._live], np.int64)
        return self.matrix(column)[0]

    def matrix(self, column: str) -> tuple[NDArray[np.int64], Floats]:
        """Return the steps (T,) at which a column was measured, and its values (T, n) over the newest index.

        What was not measured is nan here; `measured` tells it from a value that is nan.

        Raises:
            UnknownNameError: the run has no such column.
        """
        steps, values, measured = self._matrix(column)
        return steps, np.where(measured, values, np.nan)

    def measured(self, column: str) -> Bools:
        """Return which entries of `matrix(column)` are measurements, shape (T, n)."""
        return self._matrix(column)[2]

    def scalar(self, name: str) -> tuple[NDArray[np.int64], Floats]:
        """Return the steps and values of a scalar: one of `scalars`. Where a loss was never given, there is none.

        Raises:
            UnknownNameError: the run has no such scalar.
        """
        if name not in self.scalars:
            raise UnknownNameError("scalar", name, self.scalars, where=str(self.path))
        steps, values = [], []
        for live in self._live:
            rows, numbers = _single(live.block, name) if name in SINGLE else blocks.scalar(live.block, name)
            kept = live.rows[rows]
            steps.append(live.block.steps[rows][kept])
            values.append(numbers[kept])
        return _joined(steps, np.int64), _joined(values, np.float64)

    def histograms(self, path: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the steps (T,) and exponent counts (T, 512) of a parameter's gradient; empty where none was made.

        Raises:
            UnknownPathError: the run has no such path.
        """
        self.index.position(path)
        found = [
            (int(live.block.steps[i]), counts)
            for live in self._live
            if path in live.block.header["histogram_paths"]
            for i, owner, counts in blocks.histograms(live.block)
            if owner == path and live.rows[i]
        ]
        counts = np.array([c for _, c in found], np.int64).reshape(-1, 512)
        return np.array([s for s, _ in found], np.int64), counts

    # Inside

    def _signature(self) -> tuple[Any, ...]:
        return len(self), [(i.id, i.last_step, i.count, i.resolved) for i in self.incidents]

    @cached_property
    def _live(self) -> list[Live]:
        """Blocks in order, each with the rows that no later session superseded."""
        files = record_files(self.path, self._files)
        starts = _starts(files)
        found = []
        for file in files:
            for block in file.blocks:
                rows = block.steps < starts.get(file.session, np.inf)
                if rows.any():
                    found.append(Live(block, rows))
        return found

    def _starts(self) -> dict[int, float]:
        return _starts(record_files(self.path, self._files))

    def _index(self, block: blocks.Block) -> Index:
        number = int(block.header["index"])
        if number not in self._indices:
            self._indices[number] = read_index(self.path, number)
        return self._indices[number]

    def _matrix(self, column: str) -> tuple[NDArray[np.int64], Floats, Bools]:
        if column not in self.columns:
            raise UnknownNameError("column", column, self.columns, where=str(self.path))
        newest, parts = self.index, []
        for live in self._live:
            index = self._index(live.block)
            rows, values = blocks.column(live.block, column, len(index))
            measured = blocks.measured(live.block, column, len(index))
            kept = live.rows[rows]
            steps, values, measured = live.block.steps[rows][kept], values[kept], measured[kept]
            if index is not newest:
                values, measured = _aligned(values, measured, index, newest)
            parts.append((steps, values, measured))
        n = len(newest)
        return (
            _joined([s for s, _, _ in parts], np.int64),
            _joined([v for _, v, _ in parts], np.float64, n),
            _joined([m for _, _, m in parts], np.bool_, n),
        )


def read_run(path: str | os.PathLike[str]) -> Run:
    """Open a run folder.

    Raises:
        RunFormatError: it is no run folder, or one of a higher schema.
    """
    return Run(path)


def find_runs(root: str | os.PathLike[str]) -> list[Path]:
    """Return the run folders at or below a folder, in order of their paths. Other folders are passed over."""
    found = []
    for meta in sorted(Path(root).rglob("meta.json")):
        try:
            read_meta(meta.parent)
        except RunFormatError:
            continue
        found.append(meta.parent)
    return found


def _starts(files: list[BlockFile]) -> dict[int, float]:
    """Return, for each session, the first step that a later one recorded."""
    first: dict[int, float] = {}
    for file in files:
        for block in file.blocks:
            first[file.session] = min(first.get(file.session, np.inf), float(block.steps.min()))
    return {s: min((f for later, f in first.items() if later > s), default=np.inf) for s in {f.session for f in files}}


def _single(block: blocks.Block, name: str) -> tuple[Bools, Floats]:
    rows = np.ones(len(block), np.bool_)
    if name == "skipped":
        return rows, (block.arrays["flags"] >> 1 & 1).astype(np.float64)
    if name == "loss":
        rows = (block.arrays["flags"] & 1).astype(np.bool_)
    return rows, block.arrays[name][rows].astype(np.float64)


def _aligned(values: Floats, measured: Bools, index: Index, newest: Index) -> tuple[Floats, Bools]:
    """Return values and masks of one index over another's paths."""
    shared = [(i, newest.positions[p]) for i, p in enumerate(index.paths) if p in newest.positions]
    source, target = [i for i, _ in shared], [j for _, j in shared]
    moved, known = np.full((len(values), len(newest)), np.nan), np.zeros((len(values), len(newest)), np.bool_)
    moved[:, target], known[:, target] = values[:, source], measured[:, source]
    return moved, known


def _joined(parts: list[Any], dtype: Any, width: int | None = None) -> NDArray[Any]:
    if parts:
        return np.concatenate(parts).astype(dtype, copy=False)
    return np.zeros(0 if width is None else (0, width), dtype)
