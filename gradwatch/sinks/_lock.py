"""One writer per folder."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: only writers within one process are told apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderLock"]

_held: set[Path] = set()


class FolderLock:
    """Holds a folder for one writer until released, or until the process ends, however it ends.

    Record locks are used, which a forked data loader worker does not inherit: one that outlives a killed trainer
    must not keep the folder from being resumed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._file = -1

    def __del__(self) -> None:
        self.release()

    def acquire(self) -> None:
        """Raises:
        ConfigError: another writer has the folder.
        """
        if self.folder in _held:
            raise self._taken("this process")
        file = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                owner = os.read(file, 20).decode(errors="replace").strip() or "unknown"
                os.close(file)
                raise self._taken(f"process {owner}") from None
            except OSError:
                pass  # a file system without locks: better to write than to refuse
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())
        self._file = file
        _held.add(self.folder)

    def release(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            _held.discard(self.folder)

    def _taken(self, owner: str) -> ConfigError:
        return ConfigError(
            f"the run folder {str(self.folder)!r} is being written by {owner}. "
            "Give each run, and each GradWatch in a run, a folder of its own (`run_dir=` or `name=`)."
        )
