"""A folder for a run that no earlier run has."""

from __future__ import annotations

from pathlib import Path

__all__ = ["free_run_dir"]


def free_run_dir(folder: Path) -> Path:
    """Return the folder, or the first of `<folder>-1`, `<folder>-2`, ... that holds no run yet."""
    candidate, number = folder, 0
    while (candidate / "meta.json").exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
