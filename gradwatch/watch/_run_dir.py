"""Where a run's files go: what `run_dir` means at every door, and a folder that no earlier run has."""

from __future__ import annotations

import os
from pathlib import Path

from .._places import anchored
from ..errors import ConfigError

__all__ = ["RunDir", "checked_run_dir", "free_run_dir", "run_dir_of"]

RunDir = str | os.PathLike[str] | bool | None
"""A folder; False: none; None: where this door keeps files, if it keeps any; True: there too, or in the working
directory where it keeps none."""


def checked_run_dir(given: RunDir) -> RunDir:
    """Return what a door was given.

    Raises:
        ConfigError: it is no folder.
    """
    # An empty name would be the working directory's.
    if given == "" or (given is not None and not isinstance(given, (str, os.PathLike, bool))):
        raise ConfigError(f"`run_dir` takes a folder, True, False or None. Got {given!r}.")
    return given


def run_dir_of(given: RunDir, name: str, kept: Path | None, *, fresh: bool = True) -> Path | None:
    """Return the folder for a run's files, which stays where it is; None where nothing is to be written.

    Args:
        given: as at the door.
        name: of the run.
        kept: where this door keeps files; None where it keeps none.
        fresh: the run begins anew: no folder of an earlier one is taken.

    Raises:
        ConfigError: it is no folder.
    """
    checked_run_dir(given)
    if given is False:
        return None
    if isinstance(given, (str, os.PathLike)):
        return anchored(given)
    if kept is None and given is None:
        return None
    folder = anchored(kept or Path()) / name
    return free_run_dir(folder) if fresh else folder


def free_run_dir(folder: Path) -> Path:
    """Return the folder, or the first of `<folder>-1`, `<folder>-2`, ... that does not exist or is empty: neither an
    earlier run's nor a folder of the user's that happens to bear the name."""
    candidate, number = folder, 0
    while _is_taken(candidate):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _is_taken(path: Path) -> bool:
    try:
        return path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError:
        return False  # a folder that can't be looked into: writing there says what is wrong
