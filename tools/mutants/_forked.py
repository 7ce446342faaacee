"""Tests run in forks of one process in which everything is imported and collected: a start costs next to nothing."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

__all__ = ["Run", "Runner", "forked", "some_cases"]

T = TypeVar("T")


@dataclass
class Run:
    """What became of some tests: the first that failed, those that passed, and the seconds each took."""

    failed: str = ""
    passed: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def some_cases(
    items: Sequence[pytest.Item], most: int, whole: Sequence[str] = (), also: Iterable[str] = ()
) -> list[pytest.Item]:
    """Return the tests, of each function no more than so many cases: evenly spread over them, the same every time.

    Args:
        items: all tests.
        most: cases of one function.
        whole: how functions begin of which all cases are wanted.
        also: cases that are wanted.
    """
    functions: dict[str, list[str]] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item.nodeid)
    kept = set(also)
    for function, cases in functions.items():
        is_whole = function.rpartition("::")[2].startswith(tuple(whole))
        num = len(cases) if is_whole else min(most, len(cases))
        kept.update(cases[i * len(cases) // num] for i in range(num))
    return [item for item in items if item.nodeid in kept]


class Runner:
    """Runs collected tests in this process, and remembers what they reported."""

    def __init__(self, items: Sequence[pytest.Item]) -> None:
        self.items = {item.nodeid: item for item in items}
        self._failed = self._skipped = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed |= report.failed
        self._skipped |= report.skipped

    def is_late(self, name: str) -> bool:
        """Whether a test goes to the process of the late device: here a fork of its own is that process."""
        function = getattr(self.items[name], "function", None)
        return name.startswith("tests/late/") and hasattr(function, "__wrapped__")

    def run(
        self,
        names: Sequence[str],
        *,
        seconds: float = 1e9,
        stops: bool = True,
        around: Callable[[str], Any] = contextlib.nullcontext,
    ) -> Run:
        """Run tests in this order, until one fails or so much of a processor's time is spent: others may use it too."""
        run, end = Run(), time.process_time() + seconds
        items = [self.items[name] for name in names]
        if any(map(self.is_late, names)):
            _bring_the_device_here()
        for item, following in zip(items, [*items[1:], None], strict=True):
            begun = time.process_time()
            if begun > end:
                break
            self._failed = self._skipped = False
            with around(item.nodeid):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            run.seconds[item.nodeid] = time.process_time() - begun
            if self._failed:
                run.failed = run.failed or item.nodeid
                if stops:
                    break
            elif not self._skipped:
                run.passed.append(item.nodeid)
        return run


def _bring_the_device_here() -> None:
    from tests.late import process

    process._begin()
    process._submit = process._call


def forked(work: Callable[[], T], *, limit: float) -> T | str:
    """Do work in a fork of this process and return its answer; or "died", or "hung", as a text.

    It hangs where it takes more than so many seconds of a processor, or none for as long: on a machine that others use
    too, it may last much longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer")
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _in_child(work, answer)
        spent, since, hung = 0.0, time.monotonic(), False
        while not os.waitpid(child, os.WNOHANG)[0]:
            before, spent = spent, _processor_time(child)
            since = time.monotonic() if spent > before else since
            if hung := spent > limit or time.monotonic() - since > limit:
                _end(child)
                os.waitpid(child, 0)
                break
            time.sleep(0.01)
        _end(child)  # and what it started and left behind
        if hung or not answer.exists():
            return "hung" if hung else "died"
        found: T = pickle.loads(answer.read_bytes())
        return found


def _processor_time(process: int) -> float:
    """Return the seconds of a processor that a process took; 0 where nothing tells them: the clock decides then."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _in_child(work: Callable[[], Any], answer: Path) -> None:
    try:
        os.setpgid(0, 0)
        silence = os.open(os.devnull, os.O_RDWR)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        try:
            found = pickle.dumps(work())
        except Exception as error:
            found = pickle.dumps(f"died: {error!r}")
        answer.with_suffix(".part").write_bytes(found)
        answer.with_suffix(".part").rename(answer)
    finally:
        os._exit(0)


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
