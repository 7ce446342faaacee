"""Unit tests of rules: synthetic series in, expected incidents out. No model, no trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._markup import Prints
from .._text import shown
from .._warn import one_line
from ..errors import ConfigError, UnknownNameError
from ..records import MODULE, PARAMETER, Incident, Index, StepRecord, column_of
from ..rules import RuleBook, RuleEngine
from ..rules.expression import is_column, is_scalar, known_names
from ._load import load_rules
from ._series import parse_series
from ._yaml import Lines, read_yaml

__all__ = ["RuleTestReport", "RuleTestResult", "run_rule_tests"]

_TEST_KEYS = ("name", "series", "incidents", "rules", "every")
_EXPECT_KEYS = ("rule", "step", "resolved", "severity", "paths", "first_path")
MAX_TOTAL = 500_000
"""Values in all series of a file: each is a record to judge."""
MAX_EVERY = 1_000_000
_FIELDS = ("loss", "lr", "global_norm", "global_norm_after")


@dataclass(frozen=True, kw_only=True)
class RuleTestResult:
    """One test.

    Attributes:
        name: of the test.
        where: "FILE:LINE".
        problems: what was expected and did not come, or came and was not expected; empty: passed.
        incidents: all that came.
    """

    name: str
    where: str
    problems: tuple[str, ...]
    incidents: tuple[Incident, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problems


@dataclass(frozen=True, kw_only=True)
class RuleTestReport(Prints):
    """All tests of a rules file. Prints as the lines a user reads."""

    path: str
    results: tuple[RuleTestResult, ...]

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    def __str__(self) -> str:
        lines = []
        for result in self.results:
            lines.append(f"{'ok    ' if result.passed else 'FAILED'} {result.name} ({result.where})")
            lines += [f"         {problem}" for problem in result.problems]
        num_failed = sum(not result.passed for result in self.results)
        return "\n".join([*lines, f"{len(self.results)} tests, {num_failed} failed"])


def run_rule_tests(path: str | Path, *, allow_code: bool = False) -> RuleTestReport:
    """Run the `tests` of a rules file against its rules.

    Raises:
        ConfigError: the file can't be read, has no tests, or a test is not well formed; with file and line.
    """
    path = Path(path)
    content, lines = read_yaml(path), Lines(str(path))
    tests = content.get("tests")
    if not isinstance(tests, list) or not tests:
        raise ConfigError(f"{path}: there are no `tests` in this file.")
    book = load_rules(path, allow_code=allow_code)
    results: list[RuleTestResult] = []
    room = MAX_TOTAL
    for i, test in enumerate(tests):
        result, used = _run(test, lines, lines.at(tests, i), book, room)
        results.append(result)
        room -= used
    return RuleTestReport(path=str(path), results=tuple(results))


def _run(test: Any, lines: Lines, where: str, book: RuleBook, room: int) -> tuple[RuleTestResult, int]:
    """Return what became of a test, and how many values its series have; `room` is how many they may."""
    _check_keys(test, _TEST_KEYS, lines, where, "test")
    known = {rule.name for rule in book}
    only = _only(test, known, lines, where)
    columns, scalars, every = _series(test, lines, where, room)
    engine = RuleEngine(book, on_error="raise")
    problems, step = [], -1
    try:
        for record in _records(columns, scalars, every):
            engine.judge(record)
            step = record.step
        engine.finish(step + 1)
    except Exception as error:
        problems.append(f"{where}: a rule raised after step {step}: {one_line(error)}")
    found = [i for i in engine.incidents if i.name in only]
    problems += _compare(test.get("incidents") or [], found, known, lines, where)
    used = sum(len(v) for group in (*columns.values(), scalars) for v in group.values())
    return RuleTestResult(
        name=str(test.get("name", where)), where=where, problems=tuple(problems), incidents=tuple(engine.incidents)
    ), used


def _only(test: Any, known: set[str], lines: Lines, where: str) -> list[str]:
    given = test.get("rules") or sorted(known)
    only = [given] if isinstance(given, str) else given
    if not isinstance(only, list):
        raise ConfigError(f"{where}: `rules` of a test are names. Got {shown(given)}.")
    for name in only:
        if not isinstance(name, str) or name not in known:
            raise UnknownNameError("rule", name, known, where=lines.at(test, "rules"))
    return only


def _check_keys(entry: Any, keys: tuple[str, ...], lines: Lines, where: str, kind: str) -> None:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: a {kind} is a mapping. Got {shown(entry)}.")
    for key in entry:
        if key not in keys:
            raise UnknownNameError(f"key of a {kind}", key, keys, where=lines.at(entry, key))


def _series(
    test: Any, lines: Lines, where: str, room: int
) -> tuple[dict[str, dict[str, list[float | None]]], dict[str, list[float | None]], int]:
    """Return the values of columns by path, those of scalars, and the steps between two of them."""
    series = test.get("series")
    if not isinstance(series, list) or not series:
        raise ConfigError(f"{where}: a test needs `series`, a list.")
    every = test.get("every", 1)
    if isinstance(every, bool) or not isinstance(every, int) or not 1 <= every <= MAX_EVERY:
        raise ConfigError(f"{lines.at(test, 'every')}: `every` is a number of steps, 1 or more. Got {shown(every)}.")
    columns: dict[str, dict[str, list[float | None]]] = {}
    scalars: dict[str, list[float | None]] = {}
    for i, entry in enumerate(series):
        place = lines.at(series, i)
        _check_keys(entry, ("name", "path", "values"), lines, place, "series")
        name, values = entry.get("name"), parse_series(entry.get("values", ""), place)
        room -= len(values)
        if room < 0:
            raise ConfigError(f"{place}: the tests of a rules file have at most {MAX_TOTAL:,} values in all.")
        if isinstance(name, str) and is_column(name):
            if not isinstance(entry.get("path"), str):
                raise ConfigError(f"{place}: a series of {name!r} needs the `path` it is of.")
            columns.setdefault(name, {})[entry["path"]] = values
        elif isinstance(name, str) and is_scalar(name):
            scalars[name] = values
        else:
            raise UnknownNameError("column or scalar", name, known_names(), where=place)
    return columns, scalars, every


def _records(columns: Mapping[str, Any], scalars: Mapping[str, Any], every: int) -> Iterator[StepRecord]:
    index = _index(columns)
    length = max(len(v) for group in (*columns.values(), scalars) for v in group.values())
    for t in range(length):
        yield _record(t, t * every, index, columns, scalars)


def _index(columns: Mapping[str, Mapping[str, Any]]) -> Index:
    modules = {p for name, group in columns.items() if _is_of_modules(name) for p in group}
    paths = list(dict.fromkeys(p for group in columns.values() for p in group))
    paths = [p for p in paths if p not in modules] + [p for p in paths if p in modules]
    return Index(
        paths=tuple(paths),
        kinds=tuple(MODULE if p in modules else PARAMETER for p in paths),
        numel=np.ones(len(paths), np.int64),
        # Two dimensions, since rules leave biases out.
        shapes=tuple(() if p in modules else (1, 1) for p in paths),
        depth=np.arange(len(paths), dtype=np.int64),
    )


def _is_of_modules(name: str) -> bool:
    known = column_of(name)
    return known is not None and known.kind == MODULE


def _record(t: int, step: int, index: Index, columns: Mapping[str, Any], scalars: Mapping[str, Any]) -> StepRecord:
    values: dict[str, Any] = {}
    masks: dict[str, Any] = {}
    for name, group in columns.items():
        now = {p: v[t] for p, v in group.items() if t < len(v) and v[t] is not None}
        if now:
            values[name] = np.array([now.get(p, math.nan) for p in index.paths], np.float64)
            masks[name] = np.array([p in now for p in index.paths])
    plain = {name: v[t] for name, v in scalars.items() if t < len(v) and v[t] is not None}
    norms = values["grad_norm"][masks["grad_norm"]] if "grad_norm" in values else np.zeros(0)
    summed = float(np.sqrt(np.square(norms).sum())) if len(norms) else math.nan
    return StepRecord(
        step=step,
        index=index,
        loss=plain.get("loss", math.nan),
        has_loss="loss" in plain,
        lr=plain.get("lr", 1e-3),
        global_norm=plain.get("global_norm", summed),
        global_norm_after=plain.get("global_norm_after", plain.get("global_norm", summed)),
        columns=values,
        masks=masks,
        scalars={k: v for k, v in plain.items() if k not in _FIELDS},
    )


def _compare(expected: Any, found: list[Incident], known: set[str], lines: Lines, where: str) -> list[str]:
    problems, left = [], list(found)
    if not isinstance(expected, list):
        raise ConfigError(f"{where}: `incidents` of a test is a list. Got {shown(expected)}.")
    for i, entry in enumerate(expected):
        place = lines.at(expected, i)
        _check_keys(entry, _EXPECT_KEYS, lines, place, "expected incident")
        if not isinstance(entry.get("rule"), str) or entry["rule"] not in known:
            raise UnknownNameError("rule", entry.get("rule"), known, where=place)
        match = next(
            (f for f in left if f.name == entry["rule"] and entry.get("step", f.first_step) == f.first_step), None
        )
        if match is None:
            at = f" at step {entry['step']}" if "step" in entry else ""
            problems.append(f"{place}: expected an incident of {entry['rule']!r}{at}; it did not come")
            continue
        left.remove(match)
        problems += [f"{place}: {problem}" for problem in _differences(entry, match)]
    return problems + [f"{where}: not expected: {incident}" for incident in left]


def _differences(entry: Mapping[str, Any], incident: Incident) -> Iterator[str]:
    found = {
        "resolved": incident.resolved_step if incident.resolved else False,
        "severity": incident.severity,
        "paths": list(incident.paths),
        "first_path": incident.first_path,
    }
    for key, value in found.items():
        if (
            key in entry
            and entry[key] != value
            and not (key == "resolved" and entry[key] is True and value is not False)
        ):
            yield f"`{key}` of {incident.name!r} at step {incident.first_step} is {value!r}, expected {entry[key]!r}"
