"""Adapters: each translates one trainer's events into the engine's calls. Loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import suggest

if TYPE_CHECKING:
    from ._factories import AutoClip as AutoClip
    from ._factories import GradientSurgery as GradientSurgery
    from ._factories import HistogramLogger as HistogramLogger
    from .lightning import GradWatch as GradWatch

_DOORS = {
    "AutoClip": "_factories",
    "GradWatch": "lightning",
    "GradientSurgery": "_factories",
    "HistogramLogger": "_factories",
}

__all__ = ["AutoClip", "GradWatch", "GradientSurgery", "HistogramLogger"]


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. {suggest(name, __all__)}")
    value = getattr(import_module("." + _DOORS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
