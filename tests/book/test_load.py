# ruff: noqa: E501
"""Rules files: what they mean, and what they say when they can't be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import gradwatch
from gradwatch import ConfigError, load_rules
from gradwatch.book import PRESETS
from gradwatch.records import StepRecord
from gradwatch.rules import RULES, Exploding, Expression, Rule, RuleBook, Vanishing


class Mine(Rule):
    """A rule of one's own."""

    bound: float = 1.0

    def judge(self, record: StepRecord, state: Any) -> tuple[Any, Any]:
        return self.whole(record, record.loss > self.bound, record.loss, self.bound), state


class Treats:
    name = "treats"

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def apply_(self, grads: Any, context: Any) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def read(text: str, *, allow_code: bool = False, **others: str) -> RuleBook:
        for name, other in others.items():
            (tmp_path / f"{name}.yaml").write_text(other)
        (tmp_path / "rules.yaml").write_text(text)
        return load_rules(tmp_path / "rules.yaml", allow_code=allow_code)

    return read


def test_presets() -> None:
    assert {"observe", "default", "autoclip"} <= set(PRESETS)
    assert len(load_rules("observe")) == 0
    assert {r.rule_name for r in load_rules("default")} <= set(RULES) - {"expression"}
    assert not any(rule.then for rule in load_rules("default"))
    autoclip = load_rules("autoclip")
    assert [t.name for t in autoclip["exploding"].then] == ["clip_to_limit"]
    assert [t.name for t in autoclip["non_finite"].then] == ["skip_step"]
    assert autoclip["non_finite"].then[0].max_consecutive == 10
    assert {r.name for r in autoclip} == {r.name for r in load_rules("default")}


def test_default_is_what_one_gets_and_lists_and_books_pass_through() -> None:
    assert {r.name for r in load_rules()} == {r.name for r in load_rules("default")}
    book = RuleBook([Exploding()])
    assert load_rules(book) is book
    assert [r.name for r in load_rules([Exploding(), "vanishing"])] == ["exploding", "vanishing"]


def test_the_file_of_the_documentation(load: Any) -> None:
    book = load(
        """
extends: default
rules:
  - exploding: {ratio: 10}
    name: exploding-encoder
    paths: "encoder.*"
    for: 3
    keep_firing_for: 10
    severity: warning
    then: [{clip_by_global_norm: {max_norm: 1.0}}]
  - expression: "max_over(update_ratio) > 1e-2 and step > 100"
    name: updates-too-large
    severity: critical
    then: [stop]
"""
    )
    rule = book["exploding-encoder"]
    assert isinstance(rule, Exploding)
    assert (rule.ratio, rule.paths, rule.for_steps, rule.keep_firing_for) == (10, ("encoder.*",), 3, 10)
    assert (rule.then[0].name, rule.then[0].max_norm) == ("clip_by_global_norm", 1.0)
    stop = book["updates-too-large"]
    assert isinstance(stop, Expression)
    assert (stop.severity, stop.then[0].name) == ("critical", "stop")
    assert "exploding" in book


def test_a_rule_of_the_same_name_changes_what_it_says_and_keeps_the_rest(load: Any) -> None:
    book = load("extends: autoclip\nrules:\n  - exploding: {z: 20}\n    labels: {team: vision}\n")
    rule = book["exploding"]
    assert (rule.z, rule.ratio, rule.labels) == (20, 10, {"team": "vision"})
    assert [t.name for t in rule.then] == ["clip_to_limit"]


def test_rules_are_switched_off_by_name(load: Any) -> None:
    book = load("extends: default\nrules:\n  - vanishing: off\ndisable: [dead, stalled]\n")
    assert not {"vanishing", "dead", "stalled"} & {r.name for r in book}


def test_files_extend_files_beside_them(load: Any) -> None:
    book = load("extends: more.yaml\nrules: [vanishing]\n", more="rules: [dead]\ninhibits: {dead: vanishing}\n")
    assert [r.name for r in book] == ["dead", "vanishing"]
    assert book.inhibits["dead"] == ("vanishing",)


def test_numbers_with_an_exponent_are_numbers(load: Any) -> None:
    rule = load("rules:\n  - vanishing: {ratio: 1e-3}\n  - update_too_small: {ratio: 2E-5}\n")["vanishing"]
    assert isinstance(rule, Vanishing)
    assert rule.ratio == 1e-3


def test_ones_own_rules_and_treatments_by_import_path(load: Any) -> None:
    here = __name__
    text = f"rules:\n  - {here}:Mine: {{bound: 3}}\n    then: [{{'{here}:Treats': {{factor: 2}}}}]\n"
    book = load(text, allow_code=True)
    rule = book["mine"]
    assert (type(rule).__name__, rule.bound, rule.then[0].factor) == ("Mine", 3, 2)


def test_silences_and_inhibitions(load: Any) -> None:
    book = load(
        "rules: [dead, vanishing]\ninhibits: {dead: '*'}\nsilences:\n  - {rules: dead, paths: 'head.*', until: 9}\n"
    )
    assert book.inhibits["dead"] == ("*",)
    assert (book.silences[0].rules, book.silences[0].until) == ("dead", 9)


BAD = [
    ("rules:\n  - explodin\n", ":2: there is no rule 'explodin'. Did you mean 'exploding'?"),
    ("rules:\n  - vanishing\n  - exploding:\n      ratoi: 3\n", ":3: there is no setting of 'exploding' 'ratoi'. Did you mean 'ratio'"),
    ("rules:\n  - exploding: {z: 9}\n    severty: info\n", ":3: there is no setting of 'exploding' 'severty'. Did you mean 'severity'"),
    ("rules:\n  - exploding: {ratio: 0.5}\n", ":2: `ratio` of 'exploding' must be above 1. Got 0.5."),
    ("rules:\n  - exploding: {ratio: much}\n", ":2: "),
    ("rules:\n  - exploding: 3\n", ":2: settings of 'exploding' are a mapping. Got 3."),
    ("rules:\n  - exploding: {ratio: 3}\n    ratio: 4\n", ":2: 'ratio' is given twice"),
    ("rules:\n  - dead\n  - dead\n", ":3: a rule named 'dead' is already on"),
    ("rules:\n  - dead:\n    then: [skip_stpe]\n", ":3: there is no treatment or action 'skip_stpe'. Did you mean 'skip_step'"),
    ("rules:\n  - dead:\n    then: [{scale: {factr: 1}}]\n", ":3: scale: "),
    ("rules:\n  - dead:\n    then: [[1]]\n", ":3: an entry of `then` is a name"),
    ("rules:\n  - expression: 'grad_nrom > 1'\n", ":2: expression 'grad_nrom > 1', column 1: there is no column"),
    ("rules:\n  - nosuch.module:Rule\n", ":2: the module of 'nosuch.module:Rule' can't be imported"),
    ("rules:\n  - math:sqrt\n", ":2: 'math:sqrt' is not a rule class"),
    ("rules:\n  - [dead]\n", ":2: a rule is a name, or a mapping"),
    ("rules: dead\n", ":1: `rules` is a list. Got 'dead'."),
    ("extends: defalt\n", ":1: there is no preset or rules file 'defalt'. Did you mean 'default'?"),
    ("extends: rules.yaml\n", ":1: this file extends itself."),
    ("ruls: []\n", ":1: there is no key of a rules file 'ruls'. Did you mean 'rules'"),
    ("rules: []\nrules: []\n", ":2: 'rules' is given twice (first on line 1)."),
    ("rules: [\n", ":2: this is not YAML"),
    ("- dead\n", ":1: a rules file is a mapping with the key `rules`."),
    ("disable: dead\n", ":1: there is no rule to switch off 'dead'."),
    ("rules: [dead]\ninhibits: {dead: vanish}\n", ":2: there is no rule 'vanish'. Did you mean 'vanishing'"),
    ("silences: [{rule: dead}]\n", ":1: a silence has `rules`"),
    ("rules: !!python/object/apply:os.system ['true']\n", "this is not YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD)
def test_what_is_wrong_is_said_with_file_line_and_nearest_name(
    load: Any, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(text, allow_code=True)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "rules.yaml"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("defautl", "there is no preset or rules file 'defautl'. Did you mean 'default'?"),
        ("nowhere/rules.yaml", "there is no rules file 'nowhere/rules.yaml'."),
        (3, "`rules` is a preset, a rules file, a list of rules or a RuleBook. Got 3."),
        (["explodin"], "there is no rule 'explodin'. Did you mean 'exploding'?"),
        ([Exploding], "a RuleBook takes rules, such as Exploding()."),
    ],
)
def test_a_spec_that_is_none_of_the_known_forms(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        gradwatch.load_rules(spec)


def test_rules_can_be_set_up_from_a_command_line_parser() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--rule", type=Rule)
    args = ["--rule=gradwatch.rules.Exploding", "--rule.ratio=20", "--rule.for_steps=3", "--rule.paths=[a.*,b.*]"]
    rule = parser.instantiate_classes(parser.parse_args(args)).rule
    assert (type(rule), rule.ratio, rule.for_steps, rule.paths) == (Exploding, 20.0, 3, ("a.*", "b.*"))
    args = ["--rule=gradwatch.rules.Expression", "--rule.expression=loss > 3", "--rule.name=high"]
    rule = parser.instantiate_classes(parser.parse_args(args)).rule
    assert (rule.expression, rule.name) == ("loss > 3", "high")
