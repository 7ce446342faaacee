"""Writing a report in the form asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..errors import ConfigError, RunFormatError, UnknownNameError
from ..runs import Run, read_run
from ._data import ReportData
from ._html import to_html
from ._json import to_json
from ._markdown import to_markdown
from ._png import write_png

if TYPE_CHECKING:
    from ..watch import Session

__all__ = ["FORMATS", "report_text", "write_report", "write_session"]

Reported: TypeAlias = "Run | ReportData | str | os.PathLike[str]"
FORMATS = ("html", "md", "json", "png")
TEXTS: dict[str, Callable[[ReportData], str]] = {"html": to_html, "md": to_markdown, "json": to_json}
ENDINGS = {".html": "html", ".htm": "html", ".md": "md", ".markdown": "md", ".json": "json", ".png": "png"}

_calmly = np.errstate(all="ignore")  # what numpy does elsewhere is the program's business: here these are results


@_calmly
def write_report(
    run: Reported | Sequence[Reported],
    path: str | os.PathLike[str],
    format: str | None = None,  # noqa: A002
) -> Path:
    """Write a report and return its path.

    Args:
        run: a run folder (its path, or as read), or what was gathered from live objects; or several, to be seen over
            each other in one HTML file.
        path: the file; folders above it are made.
        format: one of `FORMATS`; None: by the file's ending, else HTML.

    Raises:
        UnknownNameError: there is no such format.
        ConfigError: a PNG is asked for without matplotlib, or several runs in another form than HTML.
    """
    target = Path(path)
    chosen = format if format is not None else ENDINGS.get(target.suffix.lower(), "html")
    if chosen not in FORMATS:
        raise UnknownNameError("report format", chosen, FORMATS)
    if isinstance(run, Sequence) and not isinstance(run, str):
        if chosen != "html":
            raise ConfigError(f"several runs go into one HTML report alone. Got {chosen!r}.")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(to_html([_gather(each) for each in run]), encoding="utf-8")
        return target
    data = _gather(run)
    target.parent.mkdir(parents=True, exist_ok=True)
    if chosen == "png":
        write_png(data, target)
    else:
        target.write_text(TEXTS[chosen](data), encoding="utf-8")
    return target


@_calmly
def write_session(session: Session, path: str | os.PathLike[str], format: str | None = None) -> Path:  # noqa: A002
    """Write the report of a run that is still in memory: from its run folder where it has one, else from the records
    kept (the recent ones alone). May be called while it trains."""
    data = None
    if session.run_dir is not None:
        session.sinks.flush()
        try:
            data = ReportData.from_run(read_run(session.run_dir), notes=session.notes)
        except RunFormatError:
            data = None  # not the writing process, or a sink that was switched off
    if data is None or not data.num_steps:
        data = ReportData.from_records(session.history, name=session.settings.name, notes=session.notes)
    model = {"model": type(session.model).__name__}
    data = replace(data, incidents=tuple(session.incidents), verdict=session.verdict(), meta={**model, **data.meta})
    return write_report(data, path, format)


@_calmly
def report_text(run: Reported, format: str = "md") -> str:  # noqa: A002
    """Return a report as text: HTML, markdown or JSON.

    Raises:
        UnknownNameError: there is no such format.
    """
    if format not in TEXTS:
        raise UnknownNameError("report format", format, TEXTS)
    return TEXTS[format](_gather(run))


def _gather(run: Reported) -> ReportData:
    if isinstance(run, ReportData):
        return run
    return ReportData.from_run(run if isinstance(run, Run) else read_run(run))
