"""A run as its folder holds it: every step of it. Folders are looked for below the log directory."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from gradwatch.errors import GradwatchError
from gradwatch.records import MODULE, PARAMETER, Column, Verdict, column_of, rank_incidents, told_columns
from gradwatch.runs import Run
from gradwatch.runs._folder import is_run_file, known_meta
from gradwatch.runs._recorded import SINGLE

from ._ridge import HistogramRow, magnitudes
from ._shown import Table, Unreadable
from ._wire import MISSING, sizes

__all__ = ["FolderRun", "Folders", "run_folder_at"]

HEADLINE = ("loss", "lr", "global_norm", "global_norm_after", "global_norm_applied")
DEEPEST = 8
"""Folders below the log directory that are looked into."""
APART = 3.0
"""Seconds at least between two looks at all folders."""
OPEN = 3
"""Runs held in memory at most: each is as large as its folder."""
MAX_PATHS = 256


def run_folder_at(folder: Path) -> dict[str, Any] | None:
    """Return what `meta.json` of a run folder says, or what can be said where it is damaged or lost; None of any other
    folder."""
    try:
        return known_meta(folder)[0]  # reading the run tells what is wrong with it
    except (GradwatchError, OSError):
        return None


class FolderRun:
    """A run folder, read as far as it was written.

    Args:
        path: the folder.
        root: of all runs; the run is called by its place below it.
        meta: of the folder.
    """

    def __init__(self, path: Path, root: Path, meta: Mapping[str, Any]) -> None:
        self.path, self.message = path, ""
        self.name = str(meta.get("name") or "gradwatch")
        # `version_3/gradwatch` is the run `version_3`, as its event files are; `runs/1` is the run `1`.
        is_beside_events = path.name == self.name or path.name.startswith(f"{self.name}-")
        run = _below(path.parent if is_beside_events and path != root else path, root)
        self.id = run if self.name == "gradwatch" else f"{run}@{self.name}"
        sessions = meta.get("sessions")
        told = [meta, *(s for s in (sessions if isinstance(sessions, list) else ()) if isinstance(s, dict))]
        self.starts = [each.get("started") for each in told]
        self._lock = threading.RLock()
        self._held: tuple[tuple[Any, ...], Run] | None = None

    @property
    def last_time(self) -> float:
        return max((entry[2] for entry in self._files()), default=0) / 1e9

    def stamp(self, *parts: str) -> tuple[Any, ...]:
        return self._files()

    def about(self) -> dict[str, Any]:
        with self._reading() as run:
            own = told_columns(run.meta)
            statistics = {name: _about(run, name, own) for name in run.columns}
            return {
                "id": self.id,
                "index": run.index.to_json(),
                "statistics": statistics,
                "meta": {k: v for k, v in run.meta.items() if k != "sessions"},
                "has_histograms": run.has_histograms,
                "stamp": [len(run), self.last_time],
                "notes": [f"{gap[:1].upper()}{gap[1:]}." for gap in run.health.gaps],
            }

    def statistic(self, name: str) -> Table:
        with self._reading() as run:
            if name not in run.columns:
                raise Unreadable(f"{self.id} has no statistic {name!r}. It has {', '.join(sorted(run.columns))}.")
            chosen = _rows(run, _about(run, name, told_columns(run.meta))["over"])
            is_all = len(chosen) == len(run.index)
            steps, parts = [], []
            for when, values, measured in run.parts(name):
                steps.append(when)
                parts.append(sizes(values, measured) if is_all else sizes(values[:, chosen], measured[:, chosen]))
            paths = [run.index.paths[i] for i in chosen]
            if not parts:
                return Table(np.zeros(0), np.zeros((0, len(paths)), np.float32), tuple(paths))
            return Table(np.concatenate(steps).astype(np.float64), np.concatenate(parts), tuple(paths))

    def headline(self) -> Table:
        with self._reading() as run:
            found = {name: run.scalar(name) for name in HEADLINE if name in run.scalars}
            return _table({**found, "limit": run.limits(), "clip_limit": run.clip_limits()}, run.steps())

    def scalars(self) -> Table:
        with self._reading() as run:
            names = [n for n in run.scalars if n not in SINGLE and n not in HEADLINE]
            return _table({name: run.scalar(name) for name in names}, run.steps())

    def incidents(self) -> tuple[Sequence[Mapping[str, Any]], Verdict]:
        with self._reading() as run:
            ranked = [incident for incident, _ in rank_incidents(run.incidents)]
            told = [i.to_json() if i.case is None else {**i.to_json(), "case": i.case.with_command()} for i in ranked]
            return [{**i, "paths": i["paths"][:MAX_PATHS], "num_paths": len(i["paths"])} for i in told], run.verdict()

    def histograms(self, path: str) -> Sequence[HistogramRow]:
        with self._reading() as run:
            if path not in run.index.positions:
                return []
            steps, counts = run.histograms(path)
            return [(int(s), *magnitudes(c)) for s, c in zip(steps, counts, strict=True)]

    # Inside

    def _files(self) -> tuple[tuple[str, int, int], ...]:
        """Return name, size and time of change (in nanoseconds) of every file."""
        found = []
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False) and not entry.name.startswith("."):
                        stat = entry.stat(follow_symlinks=False)
                        found.append((entry.name, stat.st_size, stat.st_mtime_ns))
        except OSError:
            return ()
        return tuple(sorted(found))

    @contextmanager
    def _reading(self) -> Iterator[Run]:
        """Hold the run as it stands now, for one request of several at once."""
        with self._lock:
            try:
                yield self._opened()
            except (GradwatchError, OSError) as problem:
                raise Unreadable(str(problem)) from problem

    def _opened(self) -> Run:
        files = self._files()
        if self._held is None or self._held[0] != files:
            run = Run(self.path) if self._held is None else self._held[1]
            run.refresh()
            self._held = files, run
        return self._held[1]

    def let_go(self) -> None:
        """Forget what was read; it is read again when it is asked for."""
        with self._lock:
            self._held = None


class Folders:
    """The run folders below a log directory, looked for now and then.

    Args:
        root: the log directory; None: there is none on this machine.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._found: dict[Path, FolderRun] = {}
        self._named: dict[Path, FolderRun] = {}
        self._looked = -APART
        self._recent: list[FolderRun] = []
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[FolderRun]:
        with self._lock:
            if self._root is not None and monotonic() - self._looked >= APART:
                self._look(self._root)
                self._looked = monotonic()
            return iter(list(self._found.values()))

    def named(self, path: Path, *, run: str, name: str, started: Any) -> FolderRun | None:
        """Return the folder that the event files of a run name; None where there is none that is the same run's.

        Args:
            path: of the folder.
            run: where the event files are.
            name: of the callback.
            started: when the run began, as its event files say.
        """
        meta = run_folder_at(path)
        if meta is None:
            return None
        with self._lock:
            found = self._named.get(path) or FolderRun(path, path, meta)
            if started not in found.starts:
                found = FolderRun(path, path, meta)
            if started not in found.starts:
                return None
            found.id = run if name == "gradwatch" else f"{run}@{name}"
            self._named[path] = found
            return found

    def used(self, folder: FolderRun) -> None:
        """Note that a run is looked at; what was read of those that were not for longest is let go."""
        with self._lock:
            self._recent = [*(f for f in self._recent if f is not folder), folder]
            gone, self._recent = self._recent[:-OPEN], self._recent[-OPEN:]
        for each in gone:
            each.let_go()

    def _look(self, root: Path) -> None:
        there = set()
        for path in _candidates(root):
            there.add(path)
            if path not in self._found and (meta := run_folder_at(path)) is not None:
                self._found[path] = FolderRun(path, root, meta)
        for path in self._found.keys() - there:
            del self._found[path]


def _candidates(root: Path) -> Iterator[Path]:
    """Yield folders with files of a run, in order; what lies in a run folder is no run."""
    below = [(root, 0)]
    while below:
        folder, depth = below.pop()
        try:
            with os.scandir(folder) as entries:
                listed = [(e.name, e.is_dir(follow_symlinks=False)) for e in entries]
        except OSError:
            continue
        if any(is_run_file(name) and not is_folder for name, is_folder in listed):
            yield folder
        if depth < DEEPEST:
            names = sorted((n for n, is_folder in listed if is_folder and not n.startswith(".")), reverse=True)
            below += [(folder / name, depth + 1) for name in names]


def _below(path: Path, root: Path) -> str:
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.name


def _about(run: Run, name: str, own: Mapping[str, Column]) -> dict[str, Any]:
    known = own.get(name) or column_of(name)
    if known is not None and known.kind in (PARAMETER, MODULE):
        return {"over": known.kind, "about": known.to_json()} if name in own else {"over": known.kind}
    measured = np.zeros(len(run.index), np.bool_)
    for _, _, each in run.parts(name):
        measured |= each.any(axis=0)
    if not (measured & run.index.is_module).any():
        return {"over": PARAMETER}
    return {"over": "all" if (measured & run.index.is_parameter).any() else MODULE}


def _rows(run: Run, over: str) -> list[int]:
    index = run.index
    chosen = {PARAMETER: index.is_parameter, MODULE: index.is_module}.get(over, np.ones(len(index), np.bool_))
    return list(np.flatnonzero(chosen).tolist())


def _table(columns: Mapping[str, tuple[Any, Any]], steps: Any) -> Table:
    """Return numbers on common steps; `MISSING` where there is none."""
    others = [when for when, _ in columns.values() if not np.array_equal(when, steps)]
    steps = np.unique(np.concatenate([steps, *others])) if others else steps
    matrix = np.full((len(steps), len(columns)), MISSING, np.float32)
    for j, (when, values) in enumerate(columns.values()):
        with np.errstate(over="ignore"):
            # -inf would say: not measured.
            matrix[np.searchsorted(steps, when), j] = np.maximum(np.asarray(values, np.float64), -3.4e38)
    return Table(steps.astype(np.float64), matrix, tuple(columns))
