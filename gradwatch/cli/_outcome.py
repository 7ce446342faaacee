"""Exit codes, and what turns incidents into one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from ..records import SEVERITIES

__all__ = ["FAIL_ON", "FINE", "FOUND", "USAGE", "add_fail_on", "verdict"]

FINE = 0
"""Nothing at or above `--fail-on`."""
FOUND = 1
"""Incidents at or above `--fail-on`, a rule's test that failed, an installation that does not work."""
USAGE = 2
"""A command, option, path or file that can't be."""

FAIL_ON = (*SEVERITIES, "never")


def add_fail_on(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--fail-on",
        choices=FAIL_ON,
        default=default,
        metavar="|".join(FAIL_ON),
        help=f"exit with 1 if anything of this severity or above was found (default: {default})",
    )


def verdict(severities: Iterable[str], fail_on: str) -> int:
    """Return `FOUND` where any severity is `fail_on` or above, else `FINE`."""
    if fail_on == "never":
        return FINE
    bar = SEVERITIES.index(fail_on)
    return FOUND if any(s not in SEVERITIES or SEVERITIES.index(s) >= bar for s in severities) else FINE
