"""See and change what flows through a model, and leave it as it was found.

Names load on first use (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import doors

if TYPE_CHECKING:
    from ._aliases import Alias as Alias
    from ._aliases import Unavailable as Unavailable
    from ._breakpoints import dead as dead
    from ._breakpoints import exceeds as exceeds
    from ._breakpoints import non_finite as non_finite
    from ._cache import Cache as Cache
    from ._capture import Capture as Capture
    from ._capture import State as State
    from ._coverage import Coverage as Coverage
    from ._flow import GradientFlow as GradientFlow
    from ._functions import Intervention as Intervention
    from ._functions import Observer as Observer
    from ._generation_cache import GenerationCache as GenerationCache
    from ._hook import Hook as Hook
    from ._manager import HookManager as HookManager
    from ._monitor import Monitor as Monitor
    from ._monitor import Statistics as Statistics
    from ._patch import add as add
    from ._patch import mean as mean
    from ._patch import noise as noise
    from ._patch import patch as patch
    from ._patch import scale as scale
    from ._patch import zero as zero
    from ._points import HookPoint as HookPoint
    from ._points import Point as Point
    from ._points import RawCall as RawCall
    from ._profile import Profile as Profile
    from ._store import ActivationStore as ActivationStore
    from ._sweep import Sweep as Sweep
    from ._tap import ModuleTap as ModuleTap
    from ._tap_stats import TapStats as TapStats
    from ._views import Heads as Heads
    from ._views import View as View

_DOORS = {
    "ActivationStore": "_store",
    "Alias": "_aliases",
    "Cache": "_cache",
    "Capture": "_capture",
    "Coverage": "_coverage",
    "GradientFlow": "_flow",
    "GenerationCache": "_generation_cache",
    "Heads": "_views",
    "Hook": "_hook",
    "HookManager": "_manager",
    "HookPoint": "_points",
    "Intervention": "_functions",
    "ModuleTap": "_tap",
    "Monitor": "_monitor",
    "Observer": "_functions",
    "Point": "_points",
    "Profile": "_profile",
    "RawCall": "_points",
    "State": "_capture",
    "Statistics": "_monitor",
    "Sweep": "_sweep",
    "TapStats": "_tap_stats",
    "Unavailable": "_aliases",
    "View": "_views",
    "add": "_patch",
    "dead": "_breakpoints",
    "exceeds": "_breakpoints",
    "mean": "_patch",
    "noise": "_patch",
    "non_finite": "_breakpoints",
    "patch": "_patch",
    "scale": "_patch",
    "zero": "_patch",
}

__all__ = [
    "ActivationStore",
    "Alias",
    "Cache",
    "Capture",
    "Coverage",
    "GradientFlow",
    "GenerationCache",
    "Heads",
    "Hook",
    "HookManager",
    "HookPoint",
    "Intervention",
    "ModuleTap",
    "Monitor",
    "Observer",
    "Point",
    "Profile",
    "RawCall",
    "State",
    "Statistics",
    "Sweep",
    "TapStats",
    "Unavailable",
    "View",
    "add",
    "dead",
    "exceeds",
    "mean",
    "noise",
    "non_finite",
    "patch",
    "scale",
    "zero",
]


__getattr__, __dir__ = doors(__name__, _DOORS, __all__)
