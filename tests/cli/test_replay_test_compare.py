from __future__ import annotations

import json

import pytest

from gradwatch.cli import FINE, FOUND, USAGE, main

from .conftest import write_run

RULES = """
rules:
  - expression: "global_norm > 5 * median(global_norm, 20)"
    name: spike
    severity: {severity}
"""


@pytest.fixture
def rules(tmp_path):
    def write(severity: str = "warning", more: str = ""):
        path = tmp_path / "rules.yaml"
        path.write_text(RULES.format(severity=severity) + more)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("severity", "bar", "code"),
    [("warning", None, FOUND), ("info", None, FINE), ("warning", "critical", FINE), ("critical", "critical", FOUND)],
)
def test_replay_judges_by_other_rules_and_says_so_by_its_code(severity, bar, code, rules, spiked, capsys) -> None:
    asked = [] if bar is None else ["--fail-on", bar]
    assert main(["replay", str(spiked), "--rules", rules(severity), *asked]) == code
    out, err = capsys.readouterr()
    assert f"[{severity}] step 30: spike in whole model" in out
    assert err.splitlines()[0] == "60 records judged by 1 rules"


def test_replay_of_a_healthy_run_is_fine(healthy, rules, capsys) -> None:
    assert main(["replay", str(healthy), "--rules", rules()]) == FINE
    assert capsys.readouterr().out == "Healthy: one rule judged 60 steps, and none fired.\n"


def test_rules_without_evidence_are_counted_by_replay_and_listed_as_json(healthy, capsys) -> None:
    main(["replay", str(healthy)])
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "nothing to judge" in line]
    main(["replay", str(healthy), "--json"])
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    never = [c["name"] for c in verdict["coverage"] if not c["judged"]]
    assert told.endswith(f"{len(never)} rules had nothing to judge (--json lists them)")
    assert set(never) <= verdict["unjudged"].keys()


def test_replay_as_json(spiked, rules, capsys) -> None:
    main(["replay", str(spiked), "--rules", rules(), "--json", "--diff"])
    told = json.loads(capsys.readouterr().out)
    assert [(i["name"], i["first_step"]) for i in told["incidents"]] == [("spike", 30)]
    assert [(c["rule"], c["judged"], c["disabled"]) for c in told["coverage"]] == [("spike", 56, False)]
    assert told["differences"][0].startswith("only in the replay: [warning] step 30: spike in whole model")


def test_replay_judges_logs_of_other_programs(tmp_path, rules, capsys) -> None:
    log = tmp_path / "metrics.csv"
    norms = [1.0] * 40
    norms[33] = 50.0
    log.write_text("step,my/norm\n" + "".join(f"{i},{n}\n" for i, n in enumerate(norms)))
    assert main(["replay", str(log), "--rules", rules(), "--scalar", "global_norm=my/norm"]) == FOUND
    assert "step 33: spike" in capsys.readouterr().out


def test_misspelt_preset_and_missing_file_are_one_line(healthy, capsys) -> None:
    assert main(["replay", str(healthy), "--rules", "autoclib"]) == USAGE
    assert (
        capsys.readouterr().err == "gradwatch: there is no preset or rules file 'autoclib'. Did you mean 'autoclip'?\n"
    )
    assert main(["replay", str(healthy), "--rules", "no/rules.yaml"]) == USAGE
    assert capsys.readouterr().err == "gradwatch: there is no rules file 'no/rules.yaml'.\n"


TESTS = """
tests:
  - name: a spike
    series: [{{name: grad_norm, path: w, values: "1x30 50 1x10"}}]
    incidents: [{{rule: spike, step: {step}}}]
"""


@pytest.mark.parametrize(("step", "code", "word"), [(31, FINE, "ok"), (12, FOUND, "FAILED")])
def test_rules_are_tested(step, code, word, rules, capsys) -> None:
    path = rules("warning", TESTS.format(step=step))
    assert main(["test", path]) == code
    assert capsys.readouterr().out.startswith(f"{word.ljust(6)} a spike ({path}:")
    assert main(["test", path, path, "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["passed"] == (code == FINE)
    assert len(told["tests"]) == 2


def test_rules_without_tests_are_bad_input(rules, capsys) -> None:
    assert main(["test", rules()]) == USAGE
    assert "there are no `tests` in this file" in capsys.readouterr().err


def test_compare_names_what_only_the_second_has(healthy, spiked, capsys) -> None:
    assert main(["compare", str(healthy), str(spiked), "--fail-on", "warning"]) == FOUND
    said = capsys.readouterr().out
    assert "loss or norm first differ at step 30" in said
    assert "only in b: [warning] step 30: exploding in decoder.weight and 1 more" in said
    assert main(["compare", str(spiked), str(healthy), "--fail-on", "warning"]) == FINE


def test_compare_of_equal_runs_finds_no_difference(healthy, tmp_path, capsys) -> None:
    twin = write_run(tmp_path / "twin")
    main(["compare", str(healthy), str(twin), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["first_difference"] is None
    assert told["numbers"]["steps"] == {"a": 60.0, "b": 60.0}
    assert told["only_a"] == told["only_b"] == []


def test_compare_of_a_run_with_itself_is_refused(healthy, capsys) -> None:
    assert main(["compare", str(healthy), str(healthy)]) == USAGE
    assert "are the same run" in capsys.readouterr().err
