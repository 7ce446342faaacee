"""A folder for a run that no earlier run has."""

from __future__ import annotations

from pathlib import Path

__all__ = ["free_run_dir"]


def free_run_dir(folder: Path) -> Path:
    """Return the folder, or the first of `<folder>-1`, `<folder>-2`, ... that does not exist or is empty: neither an
    earlier run's nor a folder of the user's that happens to bear the name."""
    candidate, number = folder, 0
    while candidate.exists() and (not candidate.is_dir() or any(candidate.iterdir())):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
