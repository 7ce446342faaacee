"""A run folder, read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from .._warn import warn
from ..errors import RunFormatError
from ..records import Incident, Incidents, Index, RuleCoverage, with_cases
from ..sinks._lock import is_being_written
from ..sinks.blocks import Block, bare, is_sound
from ._cases import CaseReader
from ._folder import (
    BlockFile,
    is_run_file,
    known_meta,
    read_annotations,
    read_incidents,
    read_index,
    read_journals,
    read_meta,
    read_summary,
    record_files,
    records_of,
    tell_missing_lines,
)
from ._health import Health, health_of
from ._live import Hole, Live, holes, live_blocks, starts_of
from ._recorded import Recorded
from ._sound import NewerError, is_count

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
        self._indices: dict[int, Index | None] = {}
        self._sound: dict[int, tuple[Block, Block | None]] = {}
        self._cases = CaseReader(self.path)
        self._has_told_lines = False
        self._told: set[Hole | tuple[Path, int]] = set()

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {len(self)} records)"

    def refresh(self) -> bool:
        """Look for what was written since; return whether there is anything new."""
        before = self._signature()
        self.meta = read_meta(self.path)
        for name in ("_read", "_live", "incidents", "health"):
            self.__dict__.pop(name, None)
        return self._signature() != before

    @cached_property
    def incidents(self) -> list[Incident]:
        """The last known state of every incident, in the order they began, each with its case where one was kept."""
        self._tell_lines()
        return Incidents(with_cases(read_incidents(self.path, self._starts()), self._cases.read()))

    @property
    def annotations(self) -> list[dict[str, Any]]:
        return [told for told in self._told_to_rules() if "judged" not in told]

    @property
    def coverage(self) -> list[RuleCoverage] | None:
        last = self.meta["sessions"][-1].get("number")
        for told in reversed(self._told_to_rules()):
            if told.get("session") == last and isinstance(told.get("judged"), list):
                found = [RuleCoverage.from_json(entry) for entry in told["judged"]]
                return [entry for entry in found if entry is not None]
        return None

    def _told_to_rules(self) -> list[dict[str, Any]]:
        self._tell_lines()
        return read_annotations(self.path, self._starts())

    @property
    def complete(self) -> bool:
        return bool(self.meta["sessions"][-1].get("complete"))

    @cached_property
    def health(self) -> Health:
        """How it ended, and whether all of it is there."""
        found = holes(*self._read, self.meta["sessions"])
        return health_of(
            self.meta["sessions"][-1],
            is_written=is_being_written(self.path),
            num_missing=sum(hole.count for hole in found),
            gaps=[str(hole) for hole in found],
        )

    @property
    def summary(self) -> str:
        """The words said at the end; "" where there are none."""
        return read_summary(self.path, self.meta["sessions"][-1].get("summary"))

    # Inside

    @property
    def _where(self) -> str:
        return str(self.path)

    def _signature(self) -> tuple[Any, ...]:
        return len(self), [(i.id, i.last_step, i.count, i.resolved) for i in self.incidents]

    def _live_blocks(self) -> Sequence[Live]:
        return self._live

    @cached_property
    def _read(self) -> tuple[list[BlockFile], list[BlockFile]]:
        """The record files and the journals, as far as they were written, every block of them sound."""
        journals = read_journals(self.path, self._files)
        segments = record_files(self.path, self._files)
        for file in (*segments, *journals):
            checked = [self._checked(block, file.path) for block in file.blocks]
            file.blocks = [block for block in checked if block is not None]
        self._tell(segments, journals)
        return segments, journals

    @cached_property
    def _live(self) -> list[Live]:
        """Blocks in order, each with the rows that no later session superseded."""
        return live_blocks(*self._read)

    def _starts(self) -> dict[int, float]:
        segments, journals = self._read
        return starts_of([*segments, *journals])

    def _checked(self, block: Block, file: Path) -> Block | None:
        """Return a block that can be read, checked once; bare where its index is gone; None where it can't."""
        if id(block) in self._sound:
            return self._sound[id(block)][1]
        number = block.header.get("index")
        index = self._index(number) if isinstance(number, int) else None
        found: Block | None = block if index is not None else bare(block)
        if not is_sound(block, None if index is None else len(index)):
            warn(f"{file}: a block is not what its header says, and is left out{records_of(block)}.", stacklevel=7)
            found = None
        # Both are held, so that no other one gets the id.
        self._sound[id(block)] = self._sound[id(found)] = block, found
        return found

    def _tell_lines(self) -> None:
        if not self._has_told_lines and not is_being_written(self.path):
            self._has_told_lines = True
            tell_missing_lines(self.path, self.meta["sessions"])

    def _tell(self, segments: list[BlockFile], journals: list[BlockFile]) -> None:
        """Warn of what is missing and nobody has told of, once."""
        if is_being_written(self.path):
            return
        # Where a session was counted to its end, its numbers tell what is missing.
        counted = {s["number"] for s in self.meta["sessions"] if is_count(s.get("records"))}
        for file in (*segments, *journals):
            key = file.path, file.end
            if file.tail is not None and file.session not in counted and key not in self._told:
                self._told.add(key)
                # What was cut short in a record file may stand in the journal.
                last = file.tail.steps[1] if file.tail.steps else None
                if last is None or not any((block.steps >= last).any() for f in journals for block in f.blocks):
                    warn(f"{file.path}: the last block was cut short and is left out.", stacklevel=6)
        for hole in holes(segments, journals, self.meta["sessions"]):
            if hole not in self._told:
                self._told.add(hole)
                warn(f"{self.path}: {hole}.", stacklevel=6)

    def _index_of(self, block: Block) -> Index:
        index = self._index(int(block.header["index"]))
        return Index.of_parameters(()) if index is None else index

    def _index(self, number: int) -> Index | None:
        if number not in self._indices:
            try:
                self._indices[number] = read_index(self.path, number)
            except NewerError:
                raise
            except RunFormatError as error:
                warn(f"{error} The records that refer to it are read without their columns.", stacklevel=8)
                self._indices[number] = None
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
    for folder, _, names in os.walk(root):
        if any(map(is_run_file, names)):
            try:
                known_meta(Path(folder))
            except RunFormatError:
                continue
            found.append(Path(folder))
    return sorted(found)
