"""What docs/rules.md shows, works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gradwatch.book import load_rules, run_rule_tests
from gradwatch.records import Index, StepRecord
from gradwatch.rules import RULES, RuleBook, RuleEngine

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_every_rule_stands_in_the_table() -> None:
    text = PAGE.read_text()
    assert [name for name in RULES if name != "expression" and f"| `{name}` |" not in text] == []


def test_the_rules_file_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "rules.py").write_text(blocks("python")[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rules.yaml").write_text(blocks("yaml")[0])
    book = load_rules(tmp_path / "rules.yaml", allow_code=True)
    assert {"exploding-encoder", "updates-too-large", "too_slow"} <= {rule.name for rule in book}


def test_the_unit_tests_pass(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(blocks("yaml")[1])
    report = run_rule_tests(tmp_path / "rules.yaml")
    assert report.passed, str(report)


def test_the_rule_of_ones_own_fires() -> None:
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(blocks("python")[1], str(PAGE), "exec", dont_inherit=True), names)
    engine = RuleEngine(RuleBook([names["TooSlow"](for_steps=1)]), on_error="raise")
    record = StepRecord(step=3, index=Index.of_parameters(["a"]), scalars={"seconds": 2.5})
    assert str(engine.judge(record).opened[0]) == "[info] step 3: too_slow in whole model (2.5 s a step)"
