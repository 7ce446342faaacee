"""The journal: every record, appended as its step ends."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from time import perf_counter

from ..records import StepRecord
from ._files import open_own, write_all
from ._rows import RowEncoder

__all__ = ["Journal"]

SLOW_SECONDS = 0.25
"""An append that takes so long holds up the training: the journal steps aside for a while."""
ASIDE_SECONDS = 30.0


class Journal:
    """Appends records to `journal-SS-NNNNNN.gwj`, one plain write each, from the thread that trains.

    What was written lies in the system's page cache, which outlives the process, however that ends. A file is dropped
    when blocks hold what is in it; until then a new one is begun beside it.

    Args:
        folder: the run folder.
        session: number of this session.
        limit_bytes: for all journals together; beyond it nothing is journalled until some are dropped.

    Attributes:
        older_bytes: of the files that are no longer written.
    """

    def __init__(self, folder: Path, *, session: int, limit_bytes: int) -> None:
        self.folder, self.session, self.limit_bytes = folder, session, limit_bytes
        self._encoder = RowEncoder()
        self._number = 0
        self._file = -1
        self._path: Path | None = None
        self._size = 0
        self._older: dict[Path, int] = {}
        self.older_bytes = 0
        self._aside_until = 0.0

    @property
    def path(self) -> Path | None:
        """The file that is being written; None before there is one."""
        return self._path

    def append(self, record: StepRecord, *, number: int, index: int) -> bool:
        """Write one record; return whether it is written. After an error the file is as it was before.

        Raises:
            OSError: it could not be written.
        """
        if self._file < 0:
            return False
        data = self._encoder.encode(record, number=number, index=index)
        if self._size + len(data) + self.older_bytes > self.limit_bytes:
            return False
        began = perf_counter()
        if began < self._aside_until:
            return False
        try:
            if os.write(self._file, data) != len(data):
                os.ftruncate(self._file, self._size)
                write_all(self._file, data)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)
        if perf_counter() - began > SLOW_SECONDS:
            self._aside_until = perf_counter() + ASIDE_SECONDS
        return True

    def begin(self) -> tuple[int, Path]:
        """Make the next file, to be given to `switch`: this may take its time.

        Raises:
            OSError: it can't be made.
        """
        self._number += 1
        path = self.folder / f"journal-{self.session:02d}-{self._number:06d}.gwj"
        return open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC), path

    def switch(self, file: int, path: Path) -> tuple[int, Path | None]:
        """Write to that file from now on; return the one that was written before."""
        before = self._file, self._path
        if self._path is not None:
            self._older[self._path] = self._size
            self.older_bytes = sum(self._older.values())
        self._file, self._path, self._size = file, path, 0
        return before

    def drop(self, path: Path) -> None:
        """Remove a file whose records are in blocks."""
        with suppress(OSError):
            path.unlink(missing_ok=True)
        self._older.pop(path, None)
        self.older_bytes = sum(self._older.values())

    def sync(self) -> None:
        """Let what was written outlive the machine, too."""
        if self._file >= 0:
            os.fsync(self._file)

    @property
    def is_gone(self) -> bool:
        """Whether somebody removed the file that is being written."""
        with suppress(OSError):
            return self._file >= 0 and os.fstat(self._file).st_nlink == 0
        return False

    def close(self) -> Path | None:
        """Write no more; return the last file."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)
        return self._path
