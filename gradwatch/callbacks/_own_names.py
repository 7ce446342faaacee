"""Names for several callbacks in one Trainer: each writes, logs and saves under one of its own."""

from __future__ import annotations

from collections.abc import Container, Iterable

__all__ = ["free_name", "own_names"]


def own_names(given: Iterable[tuple[int, str]]) -> dict[int, str]:
    """Return a name for each callback: the given one for the first that has it, `<name>-2`, ... for those after it.

    Two of one name come together where a list of callbacks goes from one Trainer to another that adds its own.

    Args:
        given: an id and a name for each callback, in the Trainer's order; an id that comes again is the same callback.
    """
    wanted = dict(given)
    names: dict[int, str] = {}
    for key, name in wanted.items():
        used = set(names.values())
        names[key] = free_name(name, used | set(wanted.values())) if name in used else name
    return names


def free_name(name: str, taken: Container[str]) -> str:
    """Return the name, or the first of `<name>-2`, `<name>-3`, ... that is not taken."""
    own, number = name, 1
    while own in taken:
        number += 1
        own = f"{name}-{number}"
    return own
