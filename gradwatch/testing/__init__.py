"""For tests: of a model that shall train (`assert_healthy`); of rules, treatments, sinks and statistics of one's own.

The names load on first use (PEP 562): a test run that uses none of them does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import doors

if TYPE_CHECKING:
    from ..sinks import MemorySink
    from ._healthy import assert_healthy
    from ._rule_laws import check_rule, odd_records
    from ._sink_laws import check_sink
    from ._statistic_laws import check_statistic
    from ._treatment_laws import check_treatment

__all__ = [
    "MemorySink",
    "assert_healthy",
    "check_rule",
    "check_sink",
    "check_statistic",
    "check_treatment",
    "odd_records",
]

_DOORS = {
    "MemorySink": "..sinks",
    "assert_healthy": "_healthy",
    "check_rule": "_rule_laws",
    "check_sink": "_sink_laws",
    "check_statistic": "_statistic_laws",
    "check_treatment": "_treatment_laws",
    "odd_records": "_rule_laws",
}


__getattr__, __dir__ = doors(__name__, _DOORS, __all__)
