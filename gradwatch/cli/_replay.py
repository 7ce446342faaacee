"""`gradwatch replay RUN --rules FILE`: what rules would have said of a run, or of another program's log."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..records import HEALTHY, NOT_ENOUGH_SEEN, NOT_HEALTHY
from ._find import add_run, open_run, pairs
from ._outcome import add_allow_code, add_fail_on, outcome
from ._terminal import say, show, show_grid, show_json

if TYPE_CHECKING:
    from ..runs import Replay

__all__ = ["HELP", "add_arguments", "run"]

HELP = "judge a logged run by other rules"
STYLES_OF = {HEALTHY: "fine", NOT_ENOUGH_SEEN: "info", NOT_HEALTHY: "warning"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add = parser.add_argument
    add("--rules", default="default", metavar="FILE", help="a rules file, or a preset (default: default)")
    add("--scalar", action="append", default=[], metavar="NAME=TAG", help="for logs: which tag is the loss, lr, ...")
    add("--column", action="append", default=[], metavar="NAME=TAGS", help="for logs: grad_norm=norms/* by layer")
    add("--diff", action="store_true", help="compare with what was said while the run was live")
    add("--json", action="store_true", help="one JSON document instead")
    add_allow_code(parser)
    add_fail_on(parser, "warning")


def run(options: argparse.Namespace) -> int:
    from ..book import load_rules
    from ..runs import replay

    book = load_rules(options.rules, allow_code=options.allow_code)
    opened = open_run(options.run, scalars=pairs(options.scalar, "--scalar"), columns=pairs(options.column, "--column"))
    result = replay(opened, book)
    differences = result.differences(opened.incidents) if options.diff else []
    if options.json:
        show_json(
            {
                "run": str(opened.path),
                "rules": options.rules,
                "records": result.num_records,
                "incidents": [i.to_json() for i in result.incidents],
                "verdict": result.verdict().to_json(),
                "coverage": [
                    {"rule": c.name, "judged": c.judged, "reason": c.reason, "disabled": c.disabled}
                    for c in result.coverage
                ],
                "notes": result.notes,
                **({"differences": differences} if options.diff else {}),
            }
        )
    else:
        _show(result, differences, asked_for=options.diff)
    return outcome(result.verdict(), result.incidents, options.fail_on)


def _show(result: Replay, differences: list[str], *, asked_for: bool) -> None:
    from ._layers import incident_grid

    failed = [f"{c.name} ({c.reason})" for c in result.coverage if c.disabled]
    silent = [c.name for c in result.coverage if not c.judged and not c.disabled]
    judged = len({c.name for c in result.coverage if c.judged})
    say(f"{result.num_records:,} records judged by {judged} rules")
    if failed:
        say(f"failed: {', '.join(dict.fromkeys(failed))}")
    if silent:
        # Counted: of most runs they are many.
        say(f"{len(dict.fromkeys(silent))} rules had nothing to judge (--json lists them)")
    for note in result.notes:
        say(f"note: {note}")
    if result.incidents:
        show_grid(incident_grid(result.incidents))
    verdict = result.verdict()
    show(verdict.headline, STYLES_OF[verdict.state])
    for incident in result.incidents:
        show()
        show(str(incident), incident.severity)
        if incident.advice:
            show(incident.advice, indent=3)
    if asked_for:
        show()
        show("\n".join(differences) if differences else "the same as was said live")
