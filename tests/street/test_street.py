"""Thirty and more programs such as people write: watching them changes nothing, keeps nothing, leaves nothing.

Each program and arm runs in a process of its own (`run.py` says how); the programs of one file share one call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from .laws import LAWS
from .street import ARMS
from .table import STREET

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def cases() -> Iterator[Any]:
    for name in STREET:
        for arm in list(ARMS)[1:]:
            yield pytest.param(name, arm, id=f"{name}-{arm}")


@cache
def outcomes(names: tuple[str, ...]) -> dict[tuple[str, str], dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.street.run", *names]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    return {(line["name"], line["arm"]): line for line in lines}


def together(name: str) -> tuple[str, ...]:
    """The programs that run in one call with this one."""
    return tuple(other for other, file in STREET.items() if file == STREET[name])


@pytest.mark.timeout(600)  # the first of a file waits for all of its programs
@pytest.mark.parametrize(("name", "arm"), cases())
def test_a_watched_program_ends_as_the_bare_one_and_nothing_is_left(name: str, arm: str) -> None:
    ran = outcomes(together(name))
    bare, watched = ran[name, "bare"], ran[name, arm]
    for outcome in (bare, watched):
        assert "error" not in outcome, outcome["error"]
    assert {law: said for law, holds in LAWS.items() if (said := holds(bare, watched))} == {}


def test_every_program_of_a_file_stands_in_the_table() -> None:
    code = (
        "from tests.street import run, street, table;"
        "[run.load(name) for name in table.STREET];"
        "print(set(street.PROGRAMS) ^ set(table.STREET))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"
