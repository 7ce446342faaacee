"""What a run was like, as one file: HTML that needs nothing else, markdown, JSON, or a picture of the heatmap."""

from __future__ import annotations

from ._data import ReportData, Table, TreatmentCount
from ._html import to_html
from ._json import to_json
from ._markdown import to_markdown
from ._png import write_png
from ._summary import Story, Summary, summarise, verdict_of
from ._words import EXPLANATIONS
from ._write import FORMATS, report_text, write_report, write_session

__all__ = [
    "EXPLANATIONS",
    "FORMATS",
    "ReportData",
    "Story",
    "Summary",
    "Table",
    "TreatmentCount",
    "report_text",
    "summarise",
    "to_html",
    "to_json",
    "to_markdown",
    "verdict_of",
    "write_png",
    "write_report",
    "write_session",
]
