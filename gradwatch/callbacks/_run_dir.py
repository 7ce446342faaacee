"""A folder for a run that no earlier run has."""

from __future__ import annotations

from pathlib import Path

__all__ = ["free_run_dir"]


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
