"""What was recorded, read column by column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._markup import Prints
from .._text import printable
from ..errors import UnknownNameError
from ..records import (
    ENDED_WELL,
    Bools,
    CaseFile,
    Floats,
    Incident,
    Index,
    RuleCoverage,
    StepRecord,
    Verdict,
    judge_run,
    rank_incidents,
)
from ..sinks import blocks
from ._card import card_of
from ._health import Health
from ._live import Live

__all__ = ["SINGLE", "Recorded"]

SINGLE = ("loss", "lr", "global_norm", "global_norm_after", "time", "epoch", "batch_idx", "num_samples", "skipped")
"""Scalars that every record has, beside those in `record.scalars`."""


class Recorded(Prints):
    """Records over one or several indices, in order. `Run` reads them from a folder, `Log` from another program's log.

    Attributes:
        meta: what is known of the run: `name`, `model`, `started`, `versions`, `options`, ...
    """

    meta: Mapping[str, Any]

    def _live_blocks(self) -> Sequence[Live]:
        raise NotImplementedError

    def _index_of(self, block: blocks.Block) -> Index:
        raise NotImplementedError

    def __len__(self) -> int:
        """Number of records."""
        return sum(int(live.rows.sum()) for live in self._live_blocks())

    @property
    def incidents(self) -> list[Incident]:
        """What the rules said while it ran; nothing where there were none."""
        return []

    @property
    def cases(self) -> list[CaseFile]:
        """Case files of the incidents that have one, in the order of causes (see `rank_incidents`)."""
        return [ranked.incident.case for ranked in rank_incidents(self.incidents) if ranked.incident.case is not None]

    @property
    def annotations(self) -> list[dict[str, Any]]:
        """What the rules were told while it ran."""
        return []

    @property
    def coverage(self) -> list[RuleCoverage] | None:
        """What each rule judged while it ran; None where that is not on record."""
        return None

    def verdict(self) -> Verdict:
        """Return whether all was well, or why that can't be said."""
        ended, how = self._ending
        return judge_run(incidents=self.incidents, coverage=self.coverage, num_steps=len(self), ended=ended, how=how)

    @property
    def _ending(self) -> tuple[str, str]:
        """How it ended: in the words of `judge_run`, and in a sentence's."""
        health = getattr(self, "health", None)
        if health is None:
            return (ENDED_WELL, "") if self.complete else ("unknown", "it has no end on record")
        if health.state == "unknown":
            return "unknown", "another program wrote this log, which does not say how the run ended"
        return str(health.state), str(health)

    def _repr_html_(self) -> str:
        return card_of(self, self._where).html()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(printable(repr(self) if cycle else f"{self!r}\n{self.verdict()}"))

    @property
    def summary(self) -> str:
        """The words said at the end; "" where there are none."""
        return ""

    @property
    def complete(self) -> bool:
        """The run came to its end, and rules that judge a whole run have spoken."""
        return True

    @property
    def health(self) -> Health:
        """How it ended, and whether all of it is there; `"unknown"` of what another program wrote."""
        return Health("unknown", "a log of another program, which does not say how it ended")

    @property
    def index(self) -> Index:
        """The newest index. Empty where nothing was recorded."""
        return self._index_of(self._live_blocks()[-1].block) if self._live_blocks() else Index.of_parameters(())

    @property
    def columns(self) -> list[str]:
        """Names of all columns that were measured at least once, in the order they appeared."""
        return list(dict.fromkeys(name for live in self._live_blocks() for name in live.block.header["columns"]))

    @property
    def scalars(self) -> list[str]:
        """Names of all scalars, those that every record has first."""
        found = dict.fromkeys(name for live in self._live_blocks() for name in live.block.header["scalars"])
        return [*SINGLE, *found]

    @property
    def thinned(self) -> bool:
        """Columns of some steps were dropped, to keep the folder below its limit."""
        return any(live.block.header["thinned"] for live in self._live_blocks())

    def records(self) -> Iterator[StepRecord]:
        """Yield every record as it was written, in order."""
        for live in self._live_blocks():
            for record, keep in zip(blocks.records(live.block, self._index_of(live.block)), live.rows, strict=True):
                if keep:
                    yield record

    def steps(self, column: str | None = None) -> NDArray[np.int64]:
        """Return the steps at which the column was measured; of all records without one."""
        if column is None:
            return _joined([live.block.steps[live.rows] for live in self._live_blocks()], np.int64)
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

    def parts(self, column: str) -> Iterator[tuple[NDArray[np.int64], Floats, Bools]]:
        """Yield what `matrix` and `measured` return, a part of the run at a time: steps, values, what was measured.

        Raises:
            UnknownNameError: the run has no such column.
        """
        if column not in self.columns:
            raise UnknownNameError("column", column, self.columns, where=self._where)
        newest = self.index
        for live in self._live_blocks():
            index = self._index_of(live.block)
            rows, values = blocks.column(live.block, column, len(index))
            measured = blocks.measured(live.block, column, len(index))
            kept = live.rows[rows]
            steps, values, measured = live.block.steps[rows][kept], values[kept], measured[kept]
            if index is not newest:
                values, measured = _aligned(values, measured, index, newest)
            yield steps, values, measured

    def limits(self) -> tuple[NDArray[np.int64], Floats]:
        """Return the steps at which a rule had a bar for the global norm, and the smallest there."""
        smallest: dict[int, float] = {}
        stated = [self.scalar(name) for name in self.scalars if name == "limit" or name.startswith("limit/")]
        for steps, values in stated:
            for step, value in zip(steps.tolist(), values.tolist(), strict=True):
                smallest[step] = min(value, smallest.get(step, np.inf))
        return _finite(smallest)

    def clip_limits(self) -> tuple[NDArray[np.int64], Floats]:
        """Return the steps at which a treatment stated a limit for the global norm, and the smallest there."""
        smallest: dict[int, float] = {}
        for live in self._live_blocks():
            steps = live.block.steps.tolist()
            for place, _, _, _, _, _, values in live.block.header["treatments"]:
                for value in (float(values[key]) for key in ("limit", "max_norm") if key in values):
                    if live.rows[place] and np.isfinite(value):
                        smallest[steps[place]] = min(value, smallest.get(steps[place], np.inf))
        return _finite(smallest)

    @property
    def has_histograms(self) -> bool:
        """At least one histogram was made."""
        return any(live.block.header["histogram_paths"] for live in self._live_blocks())

    def scalar(self, name: str) -> tuple[NDArray[np.int64], Floats]:
        """Return the steps and values of a scalar: one of `scalars`. Where a loss was not given,
        or no gradient was seen, there is none.

        Raises:
            UnknownNameError: the run has no such scalar.
        """
        if name not in self.scalars:
            raise UnknownNameError("scalar", name, self.scalars, where=self._where)
        steps, values = [], []
        for live in self._live_blocks():
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
            for live in self._live_blocks()
            if path in live.block.header["histogram_paths"]
            for i, owner, counts in blocks.histograms(live.block)
            if owner == path and live.rows[i]
        ]
        counts = np.array([c for _, c in found], np.int64).reshape(-1, 512)
        return np.array([s for s, _ in found], np.int64), counts

    # Inside

    @property
    def _where(self) -> str:
        return str(self.meta.get("name", "run"))

    def _matrix(self, column: str) -> tuple[NDArray[np.int64], Floats, Bools]:
        parts = list(self.parts(column))
        n = len(self.index)
        return (
            _joined([s for s, _, _ in parts], np.int64),
            _joined([v for _, v, _ in parts], np.float64, n),
            _joined([m for _, _, m in parts], np.bool_, n),
        )


def _single(block: blocks.Block, name: str) -> tuple[Bools, Floats]:
    rows = np.ones(len(block), np.bool_)
    if name == "skipped":
        return rows, (block.arrays["flags"] >> 1 & 1).astype(np.float64)
    if name == "loss":
        rows = (block.arrays["flags"] & 1).astype(np.bool_)
    if name in ("global_norm", "global_norm_after"):
        rows = (block.arrays["flags"] & 4) == 0
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


def _finite(numbers: Mapping[int, float]) -> tuple[NDArray[np.int64], Floats]:
    """Return steps in their order and their numbers, those alone that are finite."""
    steps = sorted(step for step, value in numbers.items() if np.isfinite(value))
    return np.array(steps, np.int64), np.array([numbers[step] for step in steps], np.float64)
