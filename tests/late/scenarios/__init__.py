"""Runs in which something happens, each told once on the CPU and once for every lag."""

from __future__ import annotations

from . import actions, adapters, faults, states, treatments
from ._registry import SCENARIOS, Scenario

__all__ = ["SCENARIOS", "Scenario", "actions", "adapters", "faults", "states", "treatments"]
