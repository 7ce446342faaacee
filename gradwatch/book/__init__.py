"""Rules files -> RuleBook, with treatments and actions resolved; unit tests of rules."""

from __future__ import annotations

from ._load import PRESETS, load_rules

__all__ = ["PRESETS", "load_rules"]
