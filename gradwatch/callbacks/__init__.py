"""Adapters: each translates one trainer's events into the engine's calls. Loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import doors

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


__getattr__, __dir__ = doors(__name__, _DOORS, __all__)
