"""What a callback in the launching process knows of a training that ran in processes of its own (forked, spawned)."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..runs import read_run

__all__ = ["Elsewhere"]


class Elsewhere:
    """A word from the rank that wrote the run folder to the process that launched it: where that folder is.

    Attributes come back from no launched process, and Lightning asks callbacks nothing in the launching one. The word
    is a small file in the temporary folder, gone as soon as it was read.
    """

    def __init__(self) -> None:
        self._pid, self._name = os.getpid(), f"gradwatch-{uuid4().hex}"
        self._folder: Path | None = None
        self.began = False

    @property
    def _file(self) -> Path:
        return Path(tempfile.gettempdir()) / self._name

    def tell(self, run_dir: Path | None) -> None:
        """Say, in a launched process, that a training has begun, and where its files are. Elsewhere this is nothing."""
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid == self._pid != os.getpid():
            with suppress(OSError):
                self._file.write_text("" if run_dir is None else str(run_dir.absolute()), encoding="utf-8")

    def ask(self) -> Path | None:
        """Return the run folder of the last training in launched processes; `began` tells whether there was one."""
        if os.getpid() == self._pid:
            with suppress(OSError):
                word = self._file.read_text(encoding="utf-8")
                self._file.unlink()
                self.began, self._folder = True, Path(word) if word else None
        return self._folder

    def read(self) -> Any:
        """Return the recorded run, or None where there is none that can be read."""
        folder = self.ask()
        if folder is not None:
            with suppress(Exception):
                return read_run(folder)
        return None

    def __del__(self) -> None:
        with suppress(Exception):
            if os.getpid() == self._pid:
                self._file.unlink(missing_ok=True)
