"""A device whose numbers come late, for tests: two devices of type "late" over host memory.

Every kernel is the CPU's, so the arithmetic is a CPU's. What is a real device's own is told apart: copies to the host
arrive `lag` ticks after they were asked for (until then the host's memory holds nan), events are over when the work
before them is, and whatever would make the host wait is counted, with the stack that led to it, or refused.
"""

from __future__ import annotations

from ._build import COMPILER_FAILURE, has_compiler, is_there
from ._late import Event, Late, late, there

__all__ = ["COMPILER_FAILURE", "Event", "Late", "has_compiler", "is_there", "late", "there"]
