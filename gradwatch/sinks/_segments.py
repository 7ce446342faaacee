"""The record files of a run folder: appending, and keeping their sum below a limit."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ._files import contents, open_own, replace_whole, write_all
from .blocks import Block, scan, segment_files, superseded, thin

__all__ = ["SEGMENT_BYTES", "Segments"]

SEGMENT_BYTES = 8 << 20
MAX_THINNED = 12
KEEP_TELLING = 8
"""So often a file is thinned about incidents, too, only when nothing else is left to thin."""
BYTES_A_RECORD = 5 << 10
"""What a record may take, on average, once the files together are larger than `FREE_BYTES`; with the newest file, which
is never thinned, that is 6 KB."""
FREE_BYTES = 16 << 20
AROUND = 16
"""Steps before and behind the beginning of an incident whose columns are kept longest."""


class Segments:
    """Appends blocks to `records-SS-NNNNNN.gwr`, and thins the oldest files when all together exceed the limit.

    Args:
        folder: the run folder.
        session: number of this session.
        limit_bytes: for all record files together. Beyond `FREE_BYTES` it is also `BYTES_A_RECORD` times the number
            of records.

    Attributes:
        num_missing: records that were let go before they could be written.
    """

    def __init__(self, folder: Path, *, session: int, limit_bytes: int) -> None:
        self.folder = folder
        self.session = session
        self.limit_bytes = limit_bytes
        self.segment_bytes = min(SEGMENT_BYTES, max(limit_bytes // 8, 1 << 16))
        self.num_missing = 0
        self._number = 0
        self._path: Path | None = None
        self._size = 0
        self._count = 0
        self._synced = True
        self._sizes = {path: path.lstat().st_size for _, _, path in segment_files(folder)}
        self._thinned = dict.fromkeys(self._sizes, 0)
        self._superseded = list(self._sizes)
        self._earlier = sum(self._sizes.values())
        self._first_step: int | None = None
        self._telling: list[int] = []

    def protect(self, step: int) -> None:
        """Keep the columns about a step longer than others."""
        self._telling = [*self._telling, step][-4096:]

    def append(self, block: Block) -> None:
        """Write one block; after an error the file is as it was before."""
        if self._first_step is None:
            self._first_step = int(block.steps.min())
        data = block.to_bytes()
        if self._path is None or self._size >= self.segment_bytes:
            self.sync()
            self._number += 1
            self._path, self._size = self.folder / f"records-{self.session:02d}-{self._number:06d}.gwr", 0
        self._write(self._path, data)
        self._size += len(data)
        self._count += len(block)
        gap = block.header.get("gap")
        self.num_missing += gap["count"] if gap else 0
        self._sizes[self._path] = self._size
        self._thinned.setdefault(self._path, 0)
        if sum(self._sizes.values()) > self._limit:
            self._shrink()

    @property
    def _limit(self) -> int:
        return min(self.limit_bytes, max(FREE_BYTES, self._earlier + BYTES_A_RECORD * self._count))

    def _write(self, path: Path, data: bytes) -> None:
        # Unbuffered: what was written survives SIGKILL, and a full disk is noticed here.
        file = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            size = os.fstat(file).st_size
            if size > self._size:  # of a write that was interrupted as it ended
                os.ftruncate(file, self._size)
            self._size = min(size, self._size)
            try:
                write_all(file, data)
                if os.fstat(file).st_size != self._size + len(data):
                    raise OSError(f"{path.name} did not grow by what was written to it")
            except BaseException:
                os.ftruncate(file, self._size)
                raise
        finally:
            os.close(file)
        self._synced = False

    def sync(self) -> None:
        """Let what was written outlive the machine, too."""
        if self._path is None or self._synced:
            return
        file = open_own(self._path, os.O_RDWR)
        try:
            os.fsync(file)
        finally:
            os.close(file)
        self._synced = True

    def _shrink(self) -> None:
        self._remove_superseded()
        # A few files at a time.
        for _ in range(4):
            candidates = [p for p in sorted(self._sizes) if p != self._path and self._thinned[p] < MAX_THINNED]
            if not candidates or sum(self._sizes.values()) <= self._limit:
                return
            self._rewrite(min(candidates, key=lambda p: (self._thinned[p], p)))

    def _remove_superseded(self) -> None:
        """Remove files of earlier sessions that hold nothing from before this session's first step."""
        for path in self._superseded:
            blocks = [block for block in self._blocks(path) if len(block)]
            first = min((int(b.steps.min()) for b in blocks), default=0)
            if self._first_step is not None and first >= self._first_step:
                numbers = [n for b in blocks if b.numbers is not None for n in (b.numbers.min(), b.numbers.max())]
                if numbers:  # what was counted is accounted for
                    replace_whole(path, superseded(int(min(numbers)), int(max(numbers))).to_bytes())
                else:
                    path.unlink(missing_ok=True)
                self._earlier -= self._sizes.pop(path, 0)
        self._superseded = []

    def _rewrite(self, path: Path) -> None:
        blocks, seen = list(self._blocks(path)), dict[str, int]()
        done = max((int(b.header["thinned"]) for b in blocks), default=0)
        if done > self._thinned[path]:  # by an earlier session
            self._thinned[path] = done
            return
        keeps_telling = self._thinned[path] < KEEP_TELLING
        thinner = (thin(b, seen, self._telling_rows(b) if keeps_telling else None) for b in blocks)
        replace_whole(path, b"".join(b.to_bytes() for b in thinner))
        self._sizes[path] = path.stat().st_size
        self._thinned[path] += 1

    def _telling_rows(self, block: Block) -> np.ndarray:
        """Return about which records something is told: near an incident, skipped, treated, or not finite."""
        steps, about = block.steps, np.array(self._telling, np.int64)
        telling = (block.arrays["flags"] & 6) != 0
        telling |= ~np.isfinite(block.arrays["global_norm"])
        if len(about):
            telling |= (np.abs(steps[:, None] - about[None]) <= AROUND).any(axis=1)
        return telling

    def _blocks(self, path: Path) -> Iterable[Block]:
        return (block for _, block in scan(contents(path), where=str(path)) if isinstance(block, Block))
