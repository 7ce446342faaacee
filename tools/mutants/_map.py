"""Which tests run which lines: found once by running them under coverage, and kept in a file."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._forked import Runner

__all__ = ["TestMap", "draw"]


@dataclass
class TestMap:
    """What every test runs, and how long it takes.

    Lines are those of `sources`. A map that was drawn of older sources is carried over by `moved_to`; a test whose file
    has changed since is drawn anew.

    Args:
        sources: text of each watched file.
        lines: of each test, of each file, the lines it runs, as bits.
        seconds: of each test that passed.
        drawn_of: of each test, the checksum of its file when it was drawn.
    """

    sources: dict[str, str] = field(default_factory=dict)
    lines: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    drawn_of: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> TestMap:
        return cls(*pickle.loads(path.read_bytes())) if path.exists() else cls()

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(pickle.dumps((self.sources, self.lines, self.seconds, self.drawn_of)))
        part.replace(path)

    def moved_to(self, sources: dict[str, str]) -> None:
        """Carry the lines over to newer sources: what moved to another file is known there too."""
        old = {file: text.splitlines() for file, text in self.sources.items() if sources.get(file) != text}
        new = {file: text.splitlines() for file, text in sources.items() if self.sources.get(file) != text}
        moves = _moves(old, new)
        for files in self.lines.values():
            before = {file: files.pop(file) for file in old if file in files}
            for file, found in moves.items():
                bits = 0
                for other, a, b, size in found:
                    bits |= (((before.get(other, 0) >> 1) >> a) & ((1 << size) - 1)) << b << 1
                if bits:
                    files[file] = bits
        self.sources = dict(sources)

    def missing(self, root: Path, names: Sequence[str]) -> list[str]:
        """Return the tests that are not on the map, or have changed."""
        return [name for name in names if self.drawn_of.get(name) != _checksum(root, name)]

    def forget_gone(self, root: Path) -> None:
        """Drop the tests of files that are no more."""
        gone = [name for name in self.drawn_of if not (root / name.partition("::")[0]).exists()]
        for name in gone:
            for part in (self.lines, self.seconds, self.drawn_of):
                part.pop(name, None)

    def add(self, other: TestMap) -> None:
        """Take over what was drawn anew."""
        for name in other.drawn_of:
            self.seconds.pop(name, None)
        self.lines |= other.lines
        self.seconds |= other.seconds
        self.drawn_of |= other.drawn_of

    def running(self, places: Sequence[tuple[str, int, int]], among: Collection[str] | None = None) -> list[str]:
        """Return the tests that run any of these lines, those first that will probably notice soonest.

        In turns the quickest of all, the one that runs most of the file, and the one that runs least besides: these see
        what others only pass by. Of one test function with many cases one case comes before any second.
        """
        wanted = [(file, ((1 << (last - first + 1)) - 1) << first) for file, first, last in places]
        names = self.seconds if among is None else self.seconds.keys() & among
        found = [n for n in names if any(self.lines[n].get(file, 0) & bits for file, bits in wanted)]
        files = {file for file, _ in wanted}
        sees = {n: sum(self.lines[n].get(file, 0).bit_count() for file in files) for n in found}
        runs = {n: sum(bits.bit_count() for bits in self.lines[n].values()) for n in found}
        orders = [
            sorted(found, key=lambda n: (self.seconds[n], n)),
            sorted(found, key=lambda n: (-sees[n], self.seconds[n], n)),
            sorted(found, key=lambda n: (-sees[n] / runs[n], self.seconds[n], n)),
        ]
        return list(dict.fromkeys(name for one in zip(*map(_by_turns, orders), strict=True) for name in one))


_A_MOVE = 4
"""So many lines in a row that stand in another file now have moved there."""


def _moves(
    old: Mapping[str, Sequence[str]], new: Mapping[str, Sequence[str]]
) -> dict[str, list[tuple[str, int, int, int]]]:
    """Return of each file the stretches of lines that are known: which file's, from where, to where, how many."""
    moves = {file: [(file, *match) for match in _matches(old.get(file, ()), new[file])] for file in new}
    lost = {file: _rest(old[file], [(a, size) for _, a, _, size in moves.get(file, ())]) for file in old}
    for file, lines in new.items():
        gained = _rest(lines, [(b, size) for _, _, b, size in moves[file]])
        for other in old:
            if other != file and len(lost[other] & gained) >= _A_MOVE:
                moves[file] += [(other, *match) for match in _matches(old[other], lines) if match[2] >= _A_MOVE]
    return moves


def _matches(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int, int]]:
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    return [(m.a, m.b, m.size) for m in matcher.get_matching_blocks() if m.size]


def _rest(lines: Sequence[str], spans: Sequence[tuple[int, int]]) -> set[str]:
    inside = {i for start, size in spans for i in range(start, start + size)}
    return {line for i, line in enumerate(lines) if i not in inside and line}


def _by_turns(names: Sequence[str]) -> list[str]:
    turns: dict[str, int] = {}
    ranked: list[tuple[int, int, str]] = []
    for name in names:
        function = name.partition("[")[0]
        turns[function] = turns.get(function, -1) + 1
        ranked.append((turns[function], len(ranked), name))
    return [name for *_, name in sorted(ranked)]


def _checksum(root: Path, name: str) -> str:
    return hashlib.sha1((root / name.partition("::")[0]).read_bytes()).hexdigest()


def draw(runner: Runner, names: Sequence[str], root: Path, folders: Sequence[str]) -> TestMap:
    """Run tests under coverage, and return what they run. Call it in a fork: it leaves a tracer behind."""
    import coverage

    tracer = coverage.Coverage(data_file=None, include=[f"{root / folder}/*" for folder in folders])
    tracer.set_option("run:disable_warnings", ["no-data-collected"])
    tracer.start()

    @contextlib.contextmanager
    def around(name: str) -> Iterator[None]:
        tracer.switch_context(name)
        yield
        tracer.switch_context("")

    run = runner.run(names, stops=False, around=around)
    tracer.stop()
    data: Any = tracer.get_data()
    drawn = TestMap(
        lines={name: {} for name in names},
        seconds={name: run.seconds[name] for name in run.passed},
        drawn_of={name: _checksum(root, name) for name in names},
    )
    for path in data.measured_files() if data else ():
        file = Path(path).relative_to(root).as_posix()
        for line, contexts in data.contexts_by_lineno(path).items():
            for name in filter(None, contexts):
                drawn.lines[name][file] = drawn.lines[name].get(file, 0) | (1 << line)
    return drawn
