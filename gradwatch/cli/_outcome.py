"""Exit codes, and what turns incidents into one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from ..records import NOT_ENOUGH_SEEN, SEVERITIES, Incident, Verdict

__all__ = ["FAIL_ON", "FINE", "FOUND", "UNSEEN", "USAGE", "add_allow_code", "add_fail_on", "outcome", "severe"]

FINE = 0
"""Nothing at or above `--fail-on`."""
FOUND = 1
"""Incidents at or above `--fail-on`, a rule's test that failed, an installation that does not work."""
USAGE = 2
"""A command, option, path or file that can't be."""
UNSEEN = 3
"""Nothing at or above `--fail-on`, but not enough was seen to say that all is well."""

FAIL_ON = (*SEVERITIES, "never")


def add_fail_on(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--fail-on",
        choices=FAIL_ON,
        default=default,
        metavar="|".join(FAIL_ON),
        help=f"exit with 1 if anything of this severity or above was found, with 3 if not enough was seen to say so "
        f"(default: {default})",
    )


def add_allow_code(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="import the classes that a rules file names as module:Class, which runs code: only for files you trust",
    )


def outcome(verdict: Verdict, incidents: Iterable[Incident], fail_on: str) -> int:
    """Return `FOUND` where an incident is at `fail_on` or above; `UNSEEN` where not enough was seen to say that there
    is none; else `FINE`. Without a bar (`never`) all is `FINE`."""
    found = severe((i.severity for i in incidents), fail_on)
    if fail_on == "never" or found:
        return found
    return UNSEEN if verdict.state == NOT_ENOUGH_SEEN else FINE


def severe(severities: Iterable[str], fail_on: str) -> int:
    """Return `FOUND` where any severity is `fail_on` or above, else `FINE`."""
    if fail_on == "never":
        return FINE
    bar = SEVERITIES.index(fail_on)
    return FOUND if any(s not in SEVERITIES or SEVERITIES.index(s) >= bar for s in severities) else FINE
