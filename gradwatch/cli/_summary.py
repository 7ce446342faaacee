"""`gradwatch summary RUN`: what a run was like, in the terminal."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import numpy as np

from ._find import add_run, gathered, open_run
from ._outcome import add_fail_on, outcome
from ._terminal import show, show_grid

if TYPE_CHECKING:
    from ..records import Verdict
    from ..report import ReportData, Summary

__all__ = ["HELP", "add_arguments", "run", "show_stories", "show_summary"]

HELP = "layers with sparklines, and the incidents, of a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--layers", type=int, default=40, metavar="N", help="rows of the table (default: 40)")
    parser.add_argument("--biases", action="store_true", help="show parameters of one dimension too")
    parser.add_argument("--coverage", action="store_true", help="list what each rule judged, and what it would need")
    parser.add_argument("--json", action="store_true", help="one JSON document instead")
    add_fail_on(parser, "never")


def run(options: argparse.Namespace) -> int:
    from ..report import to_json, verdict_of

    opened = open_run(options.run)
    data = gathered(opened)
    if options.json:
        print(to_json(data), end="", flush=True)
    else:
        show_summary(
            data,
            max_layers=max(options.layers, 1),
            biases=options.biases,
            coverage=options.coverage,
            folder=str(opened.path),
        )
    return outcome(verdict_of(data), data.incidents, options.fail_on)


def _counted(verdict: Verdict) -> list[str]:
    """Return how many rules judged: those without evidence are counted, not listed."""
    if not verdict.coverage:
        return []
    could_not = f"; {len(verdict.unjudged)} could not (--coverage lists them)" if verdict.unjudged else ""
    return [f"{len(verdict.judged)} of {len(verdict.coverage)} rules judged enough{could_not}"]


def show_summary(
    data: ReportData, *, max_layers: int = 40, biases: bool = False, coverage: bool = False, folder: str = ""
) -> None:
    """Print the summary of a run: verdict, curves, layers, incidents with advice.

    Args:
        coverage: list what each rule judged, and what it would need.
        folder: of the run, for the command that judges it by other rules.
    """
    from .._text import replay_command
    from ..report import summarise
    from ._layers import incident_grid, layer_grid

    summary = summarise(data)
    show(f"{data.name}: {summary.headline}", _style(summary.state))
    for line in summary.verdict.lines()[1:] if coverage else _counted(summary.verdict):
        show(line, "dim", indent=2)
    for fact in summary.facts:
        show(fact, "dim", indent=2)
    _show_curves(data)
    grid, left_out = layer_grid(data, max_layers=max_layers, biases=biases)
    if grid.rows:
        show()
        show_grid(grid)
    if left_out:
        show(f"... and {left_out} layers between these (--layers {left_out + len(grid.rows)} shows all)", "dim")
    if data.incidents:
        show()
        show_grid(incident_grid(data.incidents))
    show_stories(summary)
    if folder and data.incidents:
        show()
        show(
            f"What other rules would have said: {replay_command(folder)}",
            "dim",
        )
    for note in summary.notes:
        show(f"note: {note}", "dim")


def show_stories(summary: Summary) -> None:
    """Print what happened in words, the likely cause first."""
    for place, story in enumerate(summary.stories, 1):
        show()
        show(f"{place}. {story.title}", story.severity)
        for text in (story.place, story.meaning, f"What to do: {story.advice}" if story.advice else "", story.treated):
            if text:
                show(text, indent=3)
        for head, text in story.case:
            show(f"{head}: {text}", "dim", indent=5)


def _style(state: str) -> str:
    return {"healthy": "fine", "noted": "info", "unseen": "info"}.get(state, state)


def _show_curves(data: ReportData) -> None:
    from ._layers import short
    from ._sparkline import sparkline

    show()
    for name, decades in (("loss", 0.1), ("global_norm", 1.0)):
        values = data.scalars.get(name, ((), np.zeros(0)))[1]
        if np.isfinite(values).any():
            show(f"{name:12} {sparkline(values, 48, decades=decades)}  {short(values[0])} -> {short(values[-1])}")
