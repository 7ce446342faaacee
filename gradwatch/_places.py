"""Files and folders that a run writes to for as long as it lasts."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["anchored"]


def anchored(path: str | os.PathLike[str]) -> Path:
    """Return a path that means the same place for the rest of a run, whatever becomes of the working directory.

    Args:
        path: relative to the working directory of now; `~` is the home folder.
    """
    place = Path(path)
    with suppress(RuntimeError):  # nobody knows where the home folder is
        place = place.expanduser()
    with suppress(OSError):  # the working directory is no more
        place = place.absolute()
    return place
