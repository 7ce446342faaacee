"""A run folder, read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunFormatError
from ..records import Incident, Index
from ..sinks.blocks import Block
from ._folder import BlockFile, Live, read_annotations, read_incidents, read_index, read_meta, record_files
from ._recorded import Recorded

__all__ = ["Run", "find_runs", "read_run"]


class Run(Recorded):
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
    def annotations(self) -> list[dict[str, Any]]:
        return read_annotations(self.path, self._starts())

    @property
    def complete(self) -> bool:
        return bool(self.meta["sessions"][-1].get("complete"))

    @property
    def summary(self) -> str:
        """The words said at the end; "" where there are none."""
        file = self.path / "summary.md"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    # Inside

    @property
    def _where(self) -> str:
        return str(self.path)

    def _signature(self) -> tuple[Any, ...]:
        return len(self), [(i.id, i.last_step, i.count, i.resolved) for i in self.incidents]

    def _live_blocks(self) -> Sequence[Live]:
        return self._live

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

    def _index_of(self, block: Block) -> Index:
        number = int(block.header["index"])
        if number not in self._indices:
            self._indices[number] = read_index(self.path, number)
        return self._indices[number]


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
