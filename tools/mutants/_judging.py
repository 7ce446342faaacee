"""A pytest session that, instead of running its tests, breaks the package again and again and runs what matters."""

from __future__ import annotations

import gc
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ._changes import Mutant
from ._forked import Run, Runner, forked, some_cases
from ._map import TestMap, draw
from ._patch import Live, UnpatchableError, rebind

__all__ = ["Job"]

MOST_TESTS = 500
MOST_FILES_APART, MOST_TESTS_APART = 6, 100
"""Of a change that needs a process of its own, for every file of tests is collected anew there."""
SECONDS_FAR = 3600.0
"""By the clock, for tests that start processes: those that hang have limits of their own, a busy machine kills none."""


@dataclass
class Job:
    """What is to be judged.

    Args:
        mutants: the changes.
        root: the copy that is broken; the checkout is never.
        folders: those whose files are broken.
        suites: folders of the tests that may matter.
        map_path: where the map of tests is kept.
        results_path: where results go, a line each.
        seconds: of a processor, for which one change may go on surviving.
        cases: of one test function, the most that may run: of 300 alike most find what the first find.
        far: of files that no test runs within one process, those that do: tried where nothing else notices.
    """

    mutants: list[Mutant]
    root: Path
    folders: Sequence[str]
    suites: Sequence[str]
    map_path: Path
    results_path: Path
    seconds: float = 10.0
    cases: int = 20
    far: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass
class Judging:
    """The pytest plugin that does a job."""

    job: Job
    sound: dict[str, bool] = field(default_factory=dict)
    map: TestMap = field(default_factory=TestMap)
    is_drawn: bool = False
    clock: itertools.count[int] = field(default_factory=lambda: itertools.count(1_000_000_000))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        laws = [name for mutant in self.job.mutants for name in mutant.tests if name.startswith("test_")]
        seen_by = [mutant.seen_by for mutant in self.job.mutants]
        self.runner = Runner(some_cases(session.items, self.job.cases, laws, seen_by))
        session.config.pluginmanager.register(self.runner)
        self.live = Live(str(self.job.root))
        gc.collect()
        gc.freeze()  # so that forks share what is there
        files = {
            f.relative_to(self.job.root).as_posix() for d in self.job.folders for f in (self.job.root / d).glob("*.py")
        }
        self.sources = {file: (self.job.root / file).read_text() for file in sorted(files)}
        if not self.job.mutants:  # others are about to judge, several at once
            self._draw_map()
        with self.job.results_path.open("a") as out:
            for number, mutant in enumerate(self.job.mutants, 1):
                begun = time.monotonic()
                result = self._judge(mutant)
                result |= {"key": mutant.key, "kind": mutant.kind, "line": mutant.line}
                out.write(json.dumps(result) + "\n")
                out.flush()
                word = "killed  " if result["killed"] else "SURVIVED"
                took = time.monotonic() - begun
                print(
                    f"{number:4}/{len(self.job.mutants)} {word} {took:5.1f} s  {mutant.file}:{mutant.line}", flush=True
                )
                print(f"               {mutant.change[:150]}\n               {result['why'][:150]}", flush=True)
        return True

    def _draw_map(self) -> None:
        self.is_drawn = True
        test_map, names = TestMap.load(self.job.map_path), list(self.runner.items)
        test_map.forget_gone(self.job.root)
        test_map.moved_to(self.sources)
        missing = test_map.missing(self.job.root, names)
        print(f"{len(names)} tests, {len(missing)} of them to be put on the map", flush=True)
        for (file, _), group in itertools.groupby(
            sorted(missing, key=self.runner.is_late), lambda name: (name.partition("::")[0], self.runner.is_late(name))
        ):
            tests, begun = list(group), time.monotonic()
            drawn = forked(partial(draw, self.runner, tests, self.job.root, self.job.folders), limit=900)
            if isinstance(drawn, str):
                print(f"{file}: {drawn}", flush=True)
                continue
            test_map.add(drawn)
            print(f"{file}: {len(drawn.seconds)} of {len(tests)}, {time.monotonic() - begun:.1f} s", flush=True)
            test_map.save(self.job.map_path)
        self.map = test_map

    def _judge(self, mutant: Mutant) -> dict[str, Any]:
        why = self._noticed_again(mutant)
        if why:
            return {"killed": True, "why": why}
        if not self.is_drawn:
            self._draw_map()
        found = self._judge_near(mutant)
        if not found["killed"] and mutant.file in self.job.far:
            why = self._noticed_far(mutant, self.job.far[mutant.file])
            found |= {"killed": bool(why), "why": why or f"{found['why']}, and far"}
        return found

    def _noticed_again(self, mutant: Mutant) -> str:
        """Return how the test that noticed last time does so again; "" where it does not, or there is none."""
        test = mutant.seen_by
        if test in self.runner.items:
            run = self._run_broken(mutant, [test])
            return run if isinstance(run, str) else test if run.failed and self._is_sound(test, [test]) else ""
        if test.partition("::")[0] in self.job.far.get(mutant.file, ()):
            return self._noticed_far(mutant, [test])
        return ""

    def _noticed_far(self, mutant: Mutant, tests: Sequence[str]) -> str:
        """Return which of the tests that start processes notices, or how these end; "" where none does."""
        with self._written(mutant):
            run = self._run_apart(tests, seconds=SECONDS_FAR)
        if isinstance(run, str) or not run.failed:
            return run if isinstance(run, str) else ""
        if run.failed not in self.sound:
            whole = self._run_apart([run.failed], seconds=SECONDS_FAR)
            self.sound[run.failed] = isinstance(whole, Run) and not whole.failed
        return run.failed if self.sound[run.failed] else ""

    def _judge_near(self, mutant: Mutant) -> dict[str, Any]:
        names = self.map.running(self._places(mutant), self.runner.items.keys())
        # First those that state the law, where a change has one.
        names = sorted(names, key=lambda name: not any(part in name for part in mutant.tests))[:MOST_TESTS]
        while names:
            run = self._run_broken(mutant, names)
            if isinstance(run, str):
                return {"killed": True, "why": run}
            if not run.failed:
                return {"killed": False, "why": f"passed: {len(run.seconds)} of {len(names)} tests"}
            if self._is_sound(run.failed, names):
                return {"killed": True, "why": run.failed}
            names = [name for name in names if name != run.failed]
        return {"killed": False, "why": "no test runs it"}

    def _places(self, mutant: Mutant) -> list[tuple[str, int, int]]:
        """Return the lines whose tests may notice."""
        if not mutant.at_import or mutant.name.endswith("()"):
            return [(mutant.file, mutant.first, mutant.last)]
        word = re.compile(rf"\b{re.escape(mutant.name)}\b")
        places = [
            (file, number, number)
            for file, text in self.sources.items()
            for number, line in enumerate(text.splitlines(), 1)
            if word.search(line) and not (file == mutant.file and number == mutant.line)
        ]
        return (
            places
            if self.map.running(places, self.runner.items.keys())
            else [(mutant.file, 1, self.sources[mutant.file].count("\n") + 1)]
        )

    def _run_broken(self, mutant: Mutant, names: Sequence[str]) -> Run | str:
        with self._written(mutant):
            passed = Run()
            parts = self._parts(names)
            for part in parts:
                run = forked(
                    partial(self._patched, mutant, part, self.job.seconds / len(parts)), limit=self._limit(part)
                )
                if isinstance(run, str):
                    return self._run_apart(names) if run.startswith("unpatchable") else run
                passed.seconds |= run.seconds
                if run.failed:
                    passed.failed = run.failed
                    break
            return passed

    def _parts(self, names: Sequence[str]) -> list[list[str]]:
        """Return the tests of a process as any, and those of one that has the late device."""
        parts: dict[bool, list[str]] = {}
        for name in names:
            parts.setdefault(self.runner.is_late(name), []).append(name)
        return [parts[is_late] for is_late in sorted(parts)]

    def _patched(self, mutant: Mutant, names: Sequence[str], seconds: float) -> Run | str:
        try:
            path = str(self.job.root / mutant.file)
            if mutant.at_import:
                rebind(path, self.sources[mutant.file], mutant.text, mutant.function, self.live)
            else:
                self.live.patch(path, self.sources[mutant.file], mutant.text, mutant.function)
        except UnpatchableError as error:
            return f"unpatchable: {error}"
        return self.runner.run(names, seconds=seconds)

    def _limit(self, names: Sequence[str]) -> float:
        known = self.map.seconds
        return 20 * min(self.job.seconds, sum(known.get(n, self.job.seconds) for n in names)) + 60

    def _run_apart(self, names: Sequence[str], seconds: float = 0.0) -> Run | str:
        """Run tests in a process of its own, which imports everything anew; whole files of them for so many seconds."""
        if not seconds:
            files = list(dict.fromkeys(name.partition("::")[0] for name in names))[:MOST_FILES_APART]
            names = [name for name in names if name.partition("::")[0] in files][:MOST_TESTS_APART]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:xdist",
            "-p",
            "no:cacheprovider",
            "--no-header",
        ]
        options = ["-rf", "-m", "not browser"] if seconds else ["-rf"]
        try:
            done = subprocess.run(
                [*command, *options, *names],
                cwd=self.job.root,
                capture_output=True,
                text=True,
                timeout=seconds or 90 + self._limit(names),
            )
        except subprocess.TimeoutExpired:
            return "hung"
        if not done.returncode:
            return Run(passed=list(names), seconds=dict.fromkeys(names, 0.0))
        if "ERROR: not found: " in done.stderr + done.stdout and "ERROR collecting" not in done.stdout:
            return Run()  # a case that is no more notices nothing
        failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, re.M)
        name = failed.group(1) if failed else ""
        return Run(failed=name, seconds={name: 0.0}) if name in names or (name and seconds) else "died at import"

    def _is_sound(self, failed: str, names: Sequence[str]) -> bool:
        """Whether a test that killed passes on the whole package, after the same tests."""
        if failed not in self.sound:
            part = next(part for part in self._parts(names) if failed in part)
            before = part[: part.index(failed) + 1]
            run = forked(lambda: self.runner.run(before), limit=2 * self._limit(before))
            self.sound[failed] = not isinstance(run, str) and run.failed != failed
        return self.sound[failed]

    @contextmanager
    def _written(self, mutant: Mutant) -> Any:
        """Put the change into the copy's file too, for processes that tests start."""
        path = self.job.root / mutant.file
        try:
            self._write(path, mutant.text)
            yield
        finally:
            self._write(path, self.sources[mutant.file])

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text)
        when = next(self.clock)  # compiled files are known by the second of their source
        os.utime(path, (when, when))


def main() -> int:
    job: Job = pickle.loads(Path(sys.argv[1]).read_bytes())
    unused = [f"-pno:{plugin}" for plugin in ("xdist", "hypothesispytest", "cacheprovider")]
    plain = ["-q", "-s", *unused, "--no-header", "--no-summary"]
    return int(pytest.main([*plain, *job.suites], plugins=[Judging(job)]))


if __name__ == "__main__":
    raise SystemExit(main())
