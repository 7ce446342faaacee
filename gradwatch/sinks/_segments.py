"""The record files of a run folder: appending, and keeping their sum below a limit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from .blocks import Block, scan, segment_files, thin

__all__ = ["SEGMENT_BYTES", "Segments"]

SEGMENT_BYTES = 8 << 20
MAX_THINNED = 12


class Segments:
    """Appends blocks to `records-SS-NNNNNN.gwr`, and thins the oldest files when all together exceed the limit.

    Args:
        folder: the run folder.
        session: number of this session.
        limit_bytes: for all record files together.
    """

    def __init__(self, folder: Path, *, session: int, limit_bytes: int) -> None:
        self.folder = folder
        self.session = session
        self.limit_bytes = limit_bytes
        self.segment_bytes = min(SEGMENT_BYTES, max(limit_bytes // 8, 1 << 16))
        self._number = 0
        self._path: Path | None = None
        self._size = 0
        self._sizes = {path: path.stat().st_size for _, _, path in segment_files(folder)}
        self._thinned = dict.fromkeys(self._sizes, 0)
        self._superseded = list(self._sizes)
        self._first_step: int | None = None

    def append(self, block: Block) -> None:
        """Write one block; after an error the file is as it was before."""
        if self._first_step is None:
            self._first_step = int(block.steps.min())
        data = block.to_bytes()
        if self._path is None or self._size >= self.segment_bytes:
            self._number += 1
            self._path, self._size = self.folder / f"records-{self.session:02d}-{self._number:06d}.gwr", 0
        # Unbuffered: what was written survives SIGKILL, and a full disk is noticed here.
        with self._path.open("ab", buffering=0) as file:
            try:
                written = 0
                while written < len(data):
                    written += file.write(memoryview(data)[written:]) or 0
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), self._size)
                raise
        self._size += len(data)
        self._sizes[self._path] = self._size
        self._thinned.setdefault(self._path, 0)
        if sum(self._sizes.values()) > self.limit_bytes:
            self._shrink()

    def _shrink(self) -> None:
        self._remove_superseded()
        # A few files at a time: the trainer waits meanwhile.
        for _ in range(4):
            candidates = [p for p in sorted(self._sizes) if p != self._path and self._thinned[p] < MAX_THINNED]
            if not candidates or sum(self._sizes.values()) <= self.limit_bytes:
                return
            self._rewrite(min(candidates, key=lambda p: (self._thinned[p], p)))

    def _remove_superseded(self) -> None:
        """Remove files of earlier sessions that hold nothing from before this session's first step."""
        for path in self._superseded:
            first = min((int(b.steps.min()) for b in self._blocks(path)), default=0)
            if self._first_step is not None and first >= self._first_step:
                path.unlink(missing_ok=True)
                self._sizes.pop(path, None)
        self._superseded = []

    def _rewrite(self, path: Path) -> None:
        blocks, seen = list(self._blocks(path)), dict[str, int]()
        done = max((int(b.header["thinned"]) for b in blocks), default=0)
        if done > self._thinned[path]:  # by an earlier session
            self._thinned[path] = done
            return
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(thin(b, seen).to_bytes() for b in blocks))
        temporary.replace(path)
        self._sizes[path] = path.stat().st_size
        self._thinned[path] += 1

    def _blocks(self, path: Path) -> Iterable[Block]:
        return (block for _, block in scan(path.read_bytes(), where=str(path)) if block is not None)
