"""What is passed between the floors: plain, frozen, on the host. Needs numpy alone.

A `StepRecord` holds all that was measured at one optimizer step, as columns: one float per path of its `Index`.
Two things are kept apart in a column: a value that *is* nan, and a path that was not measured (its mask is False).
"""

from __future__ import annotations

from ._histogram import NUM_BINS, Buckets, Histogram
from ._incident import SEVERITIES, Finding, Incident
from ._index import MODULE, PARAMETER, Bools, Floats, Index, select_paths
from ._step import StepRecord, TreatmentReport, iter_scalars

__all__ = [
    "MODULE",
    "NUM_BINS",
    "PARAMETER",
    "SCHEMA_VERSION",
    "SEVERITIES",
    "Bools",
    "Buckets",
    "Finding",
    "Floats",
    "Histogram",
    "Incident",
    "Index",
    "StepRecord",
    "TreatmentReport",
    "iter_scalars",
    "select_paths",
]

SCHEMA_VERSION = 1
"""Version of the run folder and of the packed tensors; readers refuse a higher one."""
