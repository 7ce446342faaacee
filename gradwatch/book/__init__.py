"""Rules files -> RuleBook, with treatments and actions resolved; unit tests of rules."""

from __future__ import annotations

from ._load import PRESETS, load_rules
from ._series import parse_series
from ._statistics import load_statistics
from ._unit_tests import RuleTestReport, RuleTestResult, run_rule_tests

__all__ = [
    "PRESETS",
    "RuleTestReport",
    "RuleTestResult",
    "load_rules",
    "load_statistics",
    "parse_series",
    "run_rule_tests",
]
