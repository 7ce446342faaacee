"""`gradwatch test RULES.yaml`: unit tests of rules, on series of numbers written down by hand."""

from __future__ import annotations

import argparse

from ._find import existing
from ._outcome import FINE, FOUND, add_allow_code
from ._terminal import printable, show, show_json, show_lines

__all__ = ["HELP", "add_arguments", "run"]

HELP = "run the unit tests that rules files hold"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="RULES.yaml", help="rules files with `tests`")
    add_allow_code(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document instead")


def run(options: argparse.Namespace) -> int:
    from ..book import run_rule_tests

    reports = [run_rule_tests(existing(file, "rules file"), allow_code=options.allow_code) for file in options.files]
    if options.json:
        show_json(
            {
                "passed": all(report.passed for report in reports),
                "tests": [
                    {
                        "file": report.path,
                        "name": result.name,
                        "where": result.where,
                        "passed": result.passed,
                        "problems": result.problems,
                        "incidents": [i.to_json() for i in result.incidents],
                    }
                    for report in reports
                    for result in report.results
                ],
            }
        )
    else:
        for report in reports:
            if len(reports) > 1:
                show(report.path, "head")
            show_lines([(printable(line), "") for line in str(report).split("\n")])
    return FINE if all(report.passed for report in reports) else FOUND
