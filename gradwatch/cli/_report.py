"""`gradwatch report RUN -o FILE`: a run as one file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import ConfigError
from ._find import add_run, gathered, open_run
from ._outcome import add_fail_on, outcome
from ._terminal import say, show, show_json

__all__ = ["HELP", "add_arguments", "run"]

HELP = "a run as one HTML file that needs nothing else; or as markdown, JSON, or a picture"
FORMATS = ("html", "md", "json", "png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "-o", "--out", metavar="FILE", help="where to (default: report.html in the run's folder; - is stdout)"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: by the ending of FILE, else html")
    parser.add_argument("--json", action="store_true", help="say what was written as one JSON document")
    add_fail_on(parser, "never")


def run(options: argparse.Namespace) -> int:
    from ..report import report_text, summarise, verdict_of, write_report

    opened = open_run(options.run)
    data = gathered(opened)
    code = outcome(verdict_of(data), data.incidents, options.fail_on)
    if options.out == "-":
        if options.format == "png":
            raise ConfigError("a picture can't go to stdout: give -o FILE.")
        sys.stdout.write(report_text(data, options.format or "html"))
        return code
    path = write_report(data, _target(options, opened.path), options.format)
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


def _target(options: argparse.Namespace, run: Path) -> Path:
    if options.out is None:
        folder = run if run.is_dir() else run.parent
        return folder / f"report.{options.format or 'html'}"
    target = Path(options.out).expanduser()
    if target.is_dir():
        return target / f"report.{options.format or 'html'}"
    return target
