"""Names of a package that load on first use (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from .errors import suggest

__all__ = ["doors"]


def doors(
    package: str, modules: Mapping[str, str], public: Sequence[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        modules: name -> the module that defines it, relative to the package; one beside it begins with two dots.
        public: its `__all__`: what `dir` shows, and what an unknown name is compared with.
    """

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}. {suggest(name, public)}")
        place = modules[name]
        value = getattr(import_module(place if place.startswith(".") else f".{place}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted(public)

    return load, names
