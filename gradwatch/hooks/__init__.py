"""See and change what flows through a model, and leave it as it was found.

Names load on first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import suggest

if TYPE_CHECKING:
    from ._aliases import Alias as Alias
    from ._aliases import Unavailable as Unavailable
    from ._functions import Intervention as Intervention
    from ._functions import Observer as Observer
    from ._hook import Hook as Hook
    from ._manager import HookManager as HookManager
    from ._points import HookPoint as HookPoint
    from ._points import Point as Point
    from ._points import RawCall as RawCall
    from ._tap import ModuleTap as ModuleTap
    from ._tap_stats import TapStats as TapStats
    from ._views import Heads as Heads

_DOORS = {
    "Alias": "_aliases",
    "Heads": "_views",
    "Hook": "_hook",
    "HookManager": "_manager",
    "HookPoint": "_points",
    "Intervention": "_functions",
    "ModuleTap": "_tap",
    "Observer": "_functions",
    "Point": "_points",
    "RawCall": "_points",
    "TapStats": "_tap_stats",
    "Unavailable": "_aliases",
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
