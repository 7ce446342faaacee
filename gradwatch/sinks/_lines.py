"""Files of lines, whose lines wait until they are known to be written."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from threading import Lock

from ._files import append_to, contents

__all__ = ["Lines"]

MAX_WAITING = 20_000


class Lines:
    """Appends to a file of lines. What could not be written waits, and goes out with the next that can.

    Attributes:
        dropped: lines that waited too long, the oldest ones.
        num_written: lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dropped = self.num_written = 0
        self._waiting: deque[bytes] = deque()
        self._lock = Lock()
        self._is_begun = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def add(self, line: str) -> None:
        """Take a line; it waits for `write`."""
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append(line.encode() + b"\n")

    def write(self) -> None:
        """Write what waits, unless somebody else is about it.

        Raises:
            OSError, RunFormatError: it can't be written now; it waits on.
        """
        if not self._waiting or not self._lock.acquire(blocking=False):
            return
        try:
            while self._waiting:
                batch = list(self._waiting)
                append_to(self.path, (b"" if self._is_begun else self._end_of_cut()) + b"".join(batch))
                self._is_begun = True
                for _ in batch:
                    self._waiting.popleft()
                self.num_written += len(batch)
        finally:
            self._lock.release()

    def _end_of_cut(self) -> bytes:
        """Return what ends a line that SIGKILL cut short: it must not swallow the next one."""
        if not self.path.exists() or not (size := self.path.stat().st_size):
            return b""
        return b"" if contents(self.path, size - 1) == b"\n" else b"\n"
