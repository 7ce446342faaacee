"""`gradwatch report RUN [RUN ...] -o FILE`: a run as one file, or several over each other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ._find import RUN_HELP, gathered, open_run
from ._outcome import FOUND, add_fail_on, outcome
from ._terminal import say, show, show_json

if TYPE_CHECKING:
    from ..report import ReportData

__all__ = ["HELP", "add_arguments", "run"]

HELP = "a run (or several over each other) as one HTML file that needs nothing else; or as markdown, JSON, a picture"
FORMATS = ("html", "md", "json", "png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="+", metavar="RUN", help=f"{RUN_HELP}; several: over each other, as HTML")
    parser.add_argument(
        "-o", "--out", metavar="FILE", help="where to (default: report.html in the run's folder; - is stdout)"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: by the ending of FILE, else html")
    parser.add_argument("--json", action="store_true", help="say what was written as one JSON document")
    add_fail_on(parser, "never")


def run(options: argparse.Namespace) -> int:
    from ..report import report_text, summarise, verdict_of, write_report

    opened = [open_run(run) for run in options.run]
    several = [gathered(run) for run in opened]
    data = several[0]
    codes = [outcome(verdict_of(each), each.incidents, options.fail_on) for each in several]
    code = FOUND if FOUND in codes else max(codes)
    if len(several) > 1:
        return _write_several(several, options, opened[0].path, code)
    if options.out == "-":
        if options.format == "png":
            raise ConfigError("a picture can't go to stdout: give -o FILE.")
        sys.stdout.write(report_text(data, options.format or "html"))
        return code
    path = write_report(data, _target(options, opened[0].path), options.format)
    summary = summarise(data)
    if options.json:
        size = path.stat().st_size
        verdict = summary.verdict.state
        words = {"state": summary.state, "verdict": verdict, "headline": summary.headline}
        show_json({"path": str(path), "bytes": size, **words})
    else:
        say(summary.headline)
        show(str(path))
    return code


def _write_several(runs: Sequence[ReportData], options: argparse.Namespace, first: Path, code: int) -> int:
    from ..report import summarise, write_report

    if options.out == "-" or options.json or options.format not in (None, "html"):
        raise ConfigError("several runs go into one HTML file alone: give -o FILE.html, without --format and --json.")
    default = first.parent if first.is_dir() else first
    path = write_report(runs, _target(options, default), "html")
    for run in runs:
        say(f"{run.name}: {summarise(run).headline}")
    show(str(path))
    return code


def _target(options: argparse.Namespace, run: Path) -> Path:
    if options.out is None:
        folder = run if run.is_dir() else run.parent
        return folder / f"report.{options.format or 'html'}"
    target = Path(options.out).expanduser()
    if not target.is_dir() and not target.parent.is_dir():
        missing = f"there is no folder {str(target.parent)!r} for {target.name!r}"
        raise ConfigError(f"{missing}. Make it, or give another -o.")
    if target.is_dir():
        return target / f"report.{options.format or 'html'}"
    return target
