"""Rules are data: a rules file from anywhere can be loaded, tested and replayed, and does nothing but judge."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch import ConfigError, Watch, load_rules
from gradwatch.book import run_rule_tests
from gradwatch.callbacks import GradWatch
from gradwatch.callbacks.fabric import GradWatch as FabricGradWatch
from gradwatch.callbacks.transformers import GradWatchCallback
from gradwatch.cli import main
from gradwatch.rules import RULES
from gradwatch.runs import read_log, replay

TEST = "tests:\n  - series: [{name: loss, values: '1x5'}]\n"


def lines_that_name_code(name):
    yield f"rules: ['{name}']\n"
    yield f"rules: [{{'{name}': {{}}}}]\n"
    yield f"rules: [{{exploding: {{}}, then: ['{name}']}}]\n"
    yield f"rules: [{{exploding: {{}}, then: [{{'{name}': {{}}}}]}}]\n"
    yield f"rules: [{{exploding: {{}}, then: [{{notify: {{target: '{name}'}}}}]}}]\n"
    yield f"statistics: ['{name}']\nrules: []\n"
    yield f"statistics: [{{'{name}': {{}}}}]\nrules: []\n"


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that leaves a file where it is imported, and one where its class is called."""
    (tmp_path / "trap_of_rules.py").write_text(
        "import pathlib\n"
        "here = pathlib.Path(__file__).parent\n"
        "(here / 'imported').touch()\n"
        "class Thing:\n"
        "    def __init__(self, **settings):\n"
        "        (here / 'called').touch()\n"
        "def function(incident): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("trap_of_rules", None)


def doors(file: Path, log: Path):
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    yield lambda: load_rules(file)
    yield lambda: load_rules(str(file))
    yield lambda: run_rule_tests(file)
    yield lambda: Watch(net, optimizer, rules=str(file))
    yield lambda: GradWatch(rules=str(file))
    yield lambda: FabricGradWatch(rules=str(file))
    yield lambda: GradWatchCallback(rules=str(file))
    yield lambda: replay(read_log(log), str(file))


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss,grad_norm\n" + "".join(f"{i},1.0,2.0\n" for i in range(5)))
    return path


@pytest.mark.parametrize("name", ["trap_of_rules:Thing", "trap_of_rules:function", "trap_of_rules:none"])
def test_no_door_runs_what_a_rules_file_names(trap, log, name):
    for number, text in enumerate(lines_that_name_code(name)):
        file = trap / f"rules{number}.yaml"
        file.write_text(text + TEST)
        for door in doors(file, log):
            with pytest.raises(ConfigError, match="allow_code"):
                door()
        assert main(["test", str(file)]) == 2
        assert main(["replay", str(log), "--rules", str(file)]) == 2
    assert not (trap / "imported").exists()


def test_a_file_that_extends_another_may_no_more_than_it(trap):
    (trap / "inner.yaml").write_text("rules: ['trap_of_rules:Thing']\n")
    (trap / "outer.yaml").write_text("extends: inner.yaml\n")
    with pytest.raises(ConfigError, match="allow_code"):
        load_rules(trap / "outer.yaml")
    assert not (trap / "imported").exists()


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5, 6])
def test_with_leave_given_a_class_of_another_kind_is_refused_before_it_is_called(trap, number):
    file = trap / "rules.yaml"
    file.write_text(list(lines_that_name_code("trap_of_rules:Thing"))[number] + TEST)
    with pytest.raises(ConfigError, match=r"is not a class|is not a rule class"):
        load_rules(file, allow_code=True)
    assert main(["test", str(file), "--allow-code"]) == 2
    assert (trap / "imported").exists()
    assert not (trap / "called").exists()


def test_with_leave_given_ones_own_rule_is_used_at_every_door(tmp_path, monkeypatch, log):
    (tmp_path / "own_rules_of_test.py").write_text(
        "from gradwatch.rules import Exploding\nclass Mine(Exploding):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "rules.yaml"
    file.write_text("rules: ['own_rules_of_test:Mine']\n" + TEST)
    net = nn.Linear(2, 1)
    assert [r.rule_name for r in load_rules(file, allow_code=True)] == ["mine"]
    with Watch(net, torch.optim.SGD(net.parameters(), 0.1), rules=file, allow_code=True) as watch:
        assert [c.name for c in watch.session.engine.judge.engine(0).coverage()] == ["mine"]
    assert GradWatch(rules=file, allow_code=True).settings.book["mine"].rule_name == "mine"
    assert GradWatchCallback(rules=file, allow_code=True).settings.book["mine"].rule_name == "mine"
    FabricGradWatch(rules=file, allow_code=True)
    assert [c.name for c in replay(read_log(log), file, allow_code=True).coverage] == ["mine"]
    assert main(["test", str(file), "--allow-code"]) == 0


def test_an_error_inside_the_module_that_a_file_names_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_rules_of_test.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        load_rules(["exploding", {"broken_rules_of_test:X": {}}], allow_code=True)


# What is hostile by its form


def laughs():
    text = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
    for i in range(1, 12):
        text += f"a{i}: &a{i} [" + ",".join([f"*a{i - 1}"] * 10) + "]\n"
    return text + "rules: [*a11]\n"


HOSTILE = {
    "aliases that repeat aliases": laughs(),
    "long texts repeated": "a: &a " + "x" * 50_000 + "\nrules: [" + ",".join(["*a"] * 20_000) + "]\n",
    "an alias of what it stands in": "rules: &a [*a]\n",
    "deep lists on many lines": "rules:\n  - " + "[\n    " * 20_000,
    "deep mappings": "rules: " + "{a: " * 20_000,
    "deep lists": "rules: " + "[" * 20_000,
    "deep lists that end": "rules: " + "[" * 100 + "]" * 100,
    "deep blocks": "rules:\n" + "- " * 20_000,
    "a number of 100,000 digits": "rules: [{exploding: {ratio: " + "9" * 100_000 + "}}]\n",
    "a number that no float holds": "rules: [{exploding: {ratio: " + "9" * 400 + "}}]\n",
    "a number in base 60": "rules: [{exploding: {ratio: " + ":".join(["1"] * 50_000) + "}}]\n",
    "digits that are nearly a float": "rules: [{exploding: {ratio: " + "1" * 150_000 + "x}}]\n",
    "digits in a series": "rules: []\ntests: [{series: [{name: loss, values: '" + "1" * 150_000 + "y'}]}]\n",
    "series beyond measure": "rules: []\ntests: [{series: ["
    + ", ".join(["{name: loss, values: '0x99999 0x99999'}"] * 900)
    + "]}]\n",
    "a pattern of stars": "rules: [{exploding: {paths: '" + "*a" * 60_000 + "'}}]\n",
    "ten megabytes": "#" + "x" * 10_000_000,
    "python tags": "rules: !!python/object/apply:os.system ['touch gradwatch-was-here']\n",
    "binary": "rules: !!binary '%%%'\n",
    "sets": "rules: !!set {a, b}\n",
    "an expression of brackets": "rules: [{expression: '" + "(" * 900 + "1" + ")" * 900 + " > 1'}]\n",
    "an expression of signs": "rules: [{expression: '" + "-" * 1_900 + "1 > 0'}]\n",
    "a name too wide for memory": "rules: [{exploding: {}, then: [{checkpoint: {filename: '{rule:>999999999}'}}]}]\n",
    "a name that leads elsewhere": "rules: [{exploding: {}, then: [{checkpoint: {filename: '../../x'}}]}]\n",
    "a name that is a list": "rules: [{exploding: {name: [1]}}]\n",
    "a name of 5,000 characters": "rules: [{exploding: {name: " + "n" * 5_000 + "}}]\n",
    "extends of 5,000 characters": "extends: " + "a" * 5_000 + ".yaml\n",
    "extends with a null byte": 'extends: "a\\0b.yaml"\n',
    "keys that are lists": "? [a, b]\n: 1\n",
    "a value of 100,000 characters": "rules: [{exploding: {ratio: '" + "q" * 100_000 + "'}}]\n",
    "15,000 keys": "{" + ",".join(f"k{i}: 1" for i in range(15_000)) + "}",
    "not text": b"\xff\xfe\x00rules",
}


def told_of(load, given):
    """Return what the error says; "" where there is none."""
    try:
        load(given)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_clear_line(tmp_path, case):
    content = HOSTILE[case]
    file = tmp_path / "rules.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    told = told_of(load_rules, file) or told_of(run_rule_tests, file)
    assert "\n" not in told
    assert len(told) <= 1_000
    assert "rules.yaml" in told


def test_a_directory_or_pipe_is_no_rules_file(tmp_path):
    with pytest.raises(ConfigError, match="no such rules file"):
        load_rules(tmp_path)


NASTY = [
    None, True, -1, 0, 2**62, 1e308, float("nan"), float("inf"), "", "x", "*", "\x1b[31m", "\ud800", "a" * 400,
    [], [[]], {}, {"a": {}}, [1, "a", None], {"": 0},
]  # fmt: skip
"""Values for every setting, none of which most of them can be."""


def test_any_value_for_any_key_is_rules_or_one_line():
    rng = np.random.default_rng(0)

    def value():
        return NASTY[rng.integers(len(NASTY))]

    def entry():
        name = [*RULES, "expression", "nothing", ""][rng.integers(len(RULES) + 3)]
        cls = RULES.get(name)
        known = [*(cls.__dataclass_fields__ if cls else ()), "for", "then", "paths", "name", "labels", "severity"]
        settings = {known[rng.integers(len(known))]: value() for _ in range(rng.integers(1, 4))}
        return {name: settings} if rng.random() < 0.9 else value()

    refused = 0
    for _ in range(1500):
        content = {"rules": [entry()]}
        for key in ("extends", "disable", "inhibits", "silences", "scalars", "statistics"):
            if rng.random() < 0.1:
                content[key] = value()
        told = told_of(load_rules, content)
        refused += bool(told)
        assert not re.search(r"[\x00-\x1f\x7f]", told), content
    assert 500 < refused < 1500
