"""Objects that look like one of ours are made one, once: nobody asks later what they have and what they lack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ConfigError

__all__ = ["Bases", "adopted", "fits", "original"]


Bases = Mapping[type, Sequence[str]]
"""Kinds of ours, each with what an object must have at least to be adopted as one."""


def fits(cls: type, bases: Bases) -> bool:
    """Return whether objects of a class are of these kinds, or would be adopted."""
    return issubclass(cls, tuple(bases)) or any(_has(cls, needed) for needed in bases.values())


def _has(given: Any, needed: Sequence[str]) -> bool:
    return all(hasattr(given, name) for name in needed)


def adopted(given: Any, what: str, bases: Bases) -> Any:
    """Return the object itself where it derives from a base; else one that has what it has, and the base's defaults for
    what it lacks.

    Args:
        given: the user's object. Nothing is written on it.
        what: it is to be, with an example: said with an error.
        bases: what it is to be; the first that fits.

    Raises:
        ConfigError: it lacks what is needed, or is a class.
    """
    if isinstance(given, tuple(bases)):
        return given
    if isinstance(given, type):
        raise ConfigError(f"{what}. Got the class {given.__name__}; did you forget the brackets?")
    base = next((base for base, needed in bases.items() if _has(given, needed)), None)
    if base is None:
        raise ConfigError(f"{what}. Got {given!r}.")
    names = [name for name in dir(base) if not name.startswith("_") and hasattr(given, name)]
    members: dict[str, Any] = {name: _PassedOn(name) for name in names}
    members |= {"__init__": _keep, "__getattr__": _further, "__reduce__": _recipe, "__repr__": _shown}
    members["_adopted_as"] = what, bases
    kind: Any = type(type(given).__name__, (base,), members)
    found = kind(given)
    check = getattr(base, "__post_init__", None)
    if check is not None:
        check(found)
    return found


def original(maybe_adopted: Any) -> Any:
    """Return the user's own object behind an adopted one; any other as it is."""
    return vars(maybe_adopted)["_given"] if "_adopted_as" in vars(type(maybe_adopted)) else maybe_adopted


class _PassedOn:
    # No property: what a check puts on the adopted one stands above it.
    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, adopted_one: Any, kind: type) -> Any:
        return self if adopted_one is None else getattr(adopted_one._given, self._name)


def _keep(self: Any, given: Any) -> None:
    object.__setattr__(self, "_given", given)


def _further(self: Any, name: str) -> Any:
    if name == "_given":  # not made yet
        raise AttributeError(name)
    return getattr(self._given, name)


def _recipe(self: Any) -> tuple[Any, ...]:
    # Its class is nowhere to be imported from.
    return adopted, (self._given, *self._adopted_as)


def _shown(self: Any) -> str:
    return repr(self._given)
