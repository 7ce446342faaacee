"""What installed packages register under an entry point: whoever installs a package has let its code in already."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

__all__ = ["registered"]


def registered(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name."""
    return {point.name: point for point in entry_points(group=group)}
