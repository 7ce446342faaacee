"""What is passed between the floors: plain, frozen, on the host. Needs numpy alone.

A `StepRecord` holds all that was measured at one optimizer step, as columns: one float per path of its `Index`.
Two things are kept apart in a column: a value that *is* nan, and a path that was not measured (its mask is False).
"""

from __future__ import annotations

from ._case_file import CASE_SCHEMA, CaseFile, CaseHistogram, CaseLayer, CaseTreatment, with_cases
from ._causes import LEADS_TO, Incidents, Ranked, consequences, rank_incidents
from ._column_table import FAMILIES, FIELDS
from ._columns import (
    KINDS,
    SCALAR,
    SCALES,
    Column,
    add_column,
    column_of,
    columns,
    heading,
    is_scalar_name,
    own_columns,
    snake_case,
    told_columns,
)
from ._cost import cost_of_steps
from ._histogram import NUM_BINS, Buckets, Histogram, HistogramTable
from ._incident import SEVERITIES, Finding, Incident
from ._index import MODULE, PARAMETER, Bools, Floats, Index, select_paths
from ._kind import TRAINING_KINDS, kind_scalars, kinds_in, told_kinds
from ._sample import Sample
from ._shown import incidents_html
from ._step import StepRecord, TreatmentReport, iter_scalars
from ._verdict import (
    ENDED_WELL,
    GOING_ON,
    HEALTHY,
    NOT_ENOUGH_SEEN,
    NOT_HEALTHY,
    RuleCoverage,
    Verdict,
    judge_run,
)
from ._what_if import CHANGE_KINDS, Tried, WhatIf, gain_of

__all__ = [
    "CASE_SCHEMA",
    "CHANGE_KINDS",
    "ENDED_WELL",
    "FAMILIES",
    "FIELDS",
    "GOING_ON",
    "HEALTHY",
    "KINDS",
    "LEADS_TO",
    "MODULE",
    "NOT_ENOUGH_SEEN",
    "NOT_HEALTHY",
    "NUM_BINS",
    "PARAMETER",
    "SCALAR",
    "SCALES",
    "SCHEMA_VERSION",
    "SEVERITIES",
    "TRAINING_KINDS",
    "Bools",
    "Buckets",
    "CaseFile",
    "CaseHistogram",
    "CaseLayer",
    "CaseTreatment",
    "Column",
    "Finding",
    "Floats",
    "Histogram",
    "HistogramTable",
    "Incident",
    "Incidents",
    "Index",
    "Ranked",
    "RuleCoverage",
    "Sample",
    "StepRecord",
    "TreatmentReport",
    "Tried",
    "Verdict",
    "WhatIf",
    "add_column",
    "column_of",
    "columns",
    "consequences",
    "cost_of_steps",
    "gain_of",
    "heading",
    "is_scalar_name",
    "incidents_html",
    "iter_scalars",
    "judge_run",
    "kind_scalars",
    "kinds_in",
    "own_columns",
    "rank_incidents",
    "select_paths",
    "snake_case",
    "told_columns",
    "told_kinds",
    "with_cases",
]

SCHEMA_VERSION = 1
"""Version of the run folder and of the packed tensors; readers refuse a higher one."""
