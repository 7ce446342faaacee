"""The headline as a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from io import StringIO

from .._places import anchored
from ..errors import RunFormatError
from ..protocols import RunMeta
from ..records import StepRecord
from ._headline import SCALARS
from ._scalars import ScalarSink

__all__ = ["CsvSink"]

HEADER = ("step", "time", "lr", *SCALARS)


def inert_cell(cell: object) -> object:
    """Return a cell that no spreadsheet takes for a formula; numbers stay numbers."""
    if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r"):
        try:
            float(cell)
        except ValueError:
            return "'" + cell
    return cell


class CsvSink(ScalarSink):
    """Appends one row a log step. The columns are always the same, so that the file is never rewritten.

    An empty cell was not measured; `nan` and `inf` were. A resumed run appends to the file, and drops the rows from
    its own first step on.

    Args:
        path: of the file; folders are made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(name="")
        self.path = anchored(path)
        self._continued = False

    def open(self, meta: RunMeta) -> None:
        """Begin the file, or look whether it can be continued.

        Raises:
            RunFormatError: it has other columns.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists() or not self.path.stat().st_size:
            self._append(HEADER)
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            header = tuple(next(csv.reader(file), ()))
        if header != HEADER:
            raise RunFormatError(f"{self.path} has columns of its own: {', '.join(header[:5])}, ... Give another path.")
        self._continued = True

    def _log(self, values: Mapping[str, float], record: StepRecord, window: Sequence[StepRecord]) -> None:
        if self._continued:
            self._drop_from(window[0].step)
            self._continued = False
        row = {"step": record.step, "time": f"{record.time:.3f}", "lr": record.lr, **values}
        self._append([row.get(key, "") for key in HEADER])

    def _append(self, row: Sequence[object]) -> None:
        line = StringIO()
        csv.writer(line, lineterminator="\n").writerow([inert_cell(cell) for cell in row])
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(line.getvalue())

    def _drop_from(self, step: int) -> None:
        with self.path.open(newline="", encoding="utf-8") as file:
            header, *rows = file.read().splitlines()
        kept = [row for row in rows if row.partition(",")[0].isdigit() and int(row.partition(",")[0]) < step]
        self.path.write_text("\n".join([header, *kept, ""]), encoding="utf-8")
