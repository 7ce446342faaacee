"""See and change what flows through a model, and leave it as it was found.

Names load on first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import suggest

if TYPE_CHECKING:
    from ._tap import ModuleTap as ModuleTap
    from ._tap_stats import TapStats as TapStats

_DOORS = {
    "ModuleTap": "_tap",
    "TapStats": "_tap_stats",
}

__all__ = [*sorted(_DOORS)]


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module 'gradwatch.hooks' has no attribute {name!r}. {suggest(name, __all__)}")
    value = getattr(import_module("." + _DOORS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
