"""Unit tests of rules in rules files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from gradwatch import ConfigError
from gradwatch.book import parse_series, run_rule_tests

FILE = """
extends: default
rules:
  - expression: "global_norm > 5 * median(global_norm, 20)"
    name: spike
tests:
  - name: a spike, then a NaN
    series:
      - {name: grad_norm, path: a.weight, values: "0.2+0.01x50 960 nan _ 0.2x20"}
      - {name: loss, values: "1-0.01x75"}
    incidents:
      - {rule: spike, step: 51}
      - {rule: exploding, step: 51, resolved: 72, first_path: a.weight}
      - {rule: non_finite, step: 52, severity: critical, paths: [a.weight]}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 2.5 -3", [1, 2.5, -3]),
        ("0+1x3", [0, 1, 2, 3]),
        ("1-0.5x2", [1, 0.5, 0]),
        ("7x2", [7, 7, 7]),
        ("1e-3 1e3x1", [1e-3, 1e3, 1e3]),
        ("_ 1 _x2", [None, 1, None, None]),
        ("inf -inf", [math.inf, -math.inf]),
    ],
)
def test_series_are_written_as_in_prometheus(text: str, expected: Any) -> None:
    assert parse_series(text) == expected
    assert math.isnan(parse_series("nan")[0] or 0)


@pytest.mark.parametrize("text", ["", "a", "1x", "1+2", "_+1x3", "1x999999999", "1 + 2x3"])
def test_a_series_that_can_not_be_read_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_series(text)


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "rules.yaml").write_text(text)
    return tmp_path / "rules.yaml"


def test_tests_of_rules_pass_where_incidents_come_as_expected(tmp_path: Path) -> None:
    path = write(tmp_path, FILE)
    report = run_rule_tests(path)
    assert report.passed, str(report)
    assert str(report) == f"ok     a spike, then a NaN ({path}:7)\n1 tests, 0 failed"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("step: 51}", "step: 50}", ":12: expected an incident of 'spike' at step 50; it did not come"),
        ("      - {rule: spike, step: 51}\n", "", ":7: not expected: [warning] step 51: spike in whole model"),
        ("resolved: 72", "resolved: 60", ":13: `resolved` of 'exploding' at step 51 is 72, expected 60"),
        (
            "severity: critical",
            "severity: info",
            ":14: `severity` of 'non_finite' at step 52 is 'critical', expected 'info'",
        ),
    ],
)
def test_tests_of_rules_fail_with_what_differs(tmp_path: Path, old: str, new: str, problem: str) -> None:
    report = run_rule_tests(write(tmp_path, FILE.replace(old, new, 1)))
    assert not report.passed
    assert problem in str(report)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: loss", "name: lss", ":10: there is no column or scalar 'lss'. Did you mean 'loss'"),
        ("path: a.weight, ", "", ":9: a series of 'grad_norm' needs the `path` it is of."),
        ("rule: spike", "rule: spik", ":12: there is no rule 'spik'. Did you mean 'spike'?"),
        ("    series:", "    serie:", ":8: there is no key of a test 'serie'. Did you mean 'series'"),
        ('"1-0.01x75"', '"1-0.01"', ":10: '1-0.01' is no part of a series."),
    ],
)  # fmt: skip
def test_a_test_that_is_not_well_formed_says_where(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run_rule_tests(write(tmp_path, FILE.replace(old, new, 1)))
    assert message in str(error.value)


def test_a_file_without_tests_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no `tests` in this file"):
        run_rule_tests(write(tmp_path, "extends: default\n"))
