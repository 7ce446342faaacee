"""The Lightning callback in a LightningCLI, by both names that Lightning goes by. Each case is a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("jsonargparse")
pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "cli_program.py"
FILE = """
extends: default
rules:
  - exploding: {ratio: 12}
    then: [clip_to_limit]
"""
RULES = {
    "preset": "autoclip",
    "file": "rules.yaml",
    "mappings": [{"exploding": {"ratio": 12}, "name": "bang", "then": ["clip_to_limit"]}, {"non_finite": None}],
    "mapping": {"extends": "observe", "rules": [{"non_finite": None, "then": [{"skip_step": {"max_consecutive": 5}}]}]},
    "class-paths": [
        {
            "class_path": "gradwatch.rules.NonFinite",
            "init_args": {
                "severity": "warning",
                "then": [{"class_path": "gradwatch.treatments.SkipStep", "init_args": {"max_consecutive": 5}}],
            },
        },
        {"class_path": "gradwatch.rules.Expression", "init_args": {"expression": "loss > 100", "name": "large-loss"}},
    ],
}
FOUND = {
    "preset": ("exploding", ["Exploding", "warning", ["clip_to_limit"]]),
    "file": ("exploding", ["Exploding", "warning", ["clip_to_limit"]]),
    "mappings": ("bang", ["Exploding", "warning", ["clip_to_limit"]]),
    "mapping": ("non_finite", ["NonFinite", "critical", ["skip_step"]]),
    "class-paths": ("non_finite", ["NonFinite", "warning", ["skip_step"]]),
}


def run(folder: Path, package: str, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment.pop("GRADWATCH", None)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), package, "fit", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def config(folder: Path, rules: object) -> Path:
    (folder / "rules.yaml").write_text(FILE)
    callback = {"class_path": "gradwatch.callbacks.GradWatch", "init_args": {"rules": rules, "verbose": False}}
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = {"max_epochs": 1, "accelerator": "cpu", "callbacks": [callback], **dict.fromkeys(quiet, False)}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": trainer}, sort_keys=False))
    return path


def found(output: str) -> dict:
    return json.loads(output.partition("FOUND ")[2])


@pytest.mark.parametrize(
    ("package", "form"), [("lightning.pytorch", "class-paths"), *(("pytorch_lightning", form) for form in RULES)]
)
def test_rules_in_the_configuration_file(tmp_path: Path, package: str, form: str) -> None:
    seen = found(run(tmp_path, package, "--config", str(config(tmp_path, RULES[form]))))
    name, rule = FOUND[form]
    assert seen["rules"][name] == rule
    assert seen["records"] == 8
    assert seen["is_callback"]


def test_a_printed_configuration_says_the_same_when_it_is_read_again(tmp_path: Path) -> None:
    path = config(tmp_path, RULES["class-paths"])
    printed = run(tmp_path, "lightning.pytorch", "--config", str(path), "--print_config")
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert run(tmp_path, "lightning.pytorch", "--config", str(again), "--print_config") == printed
    assert found(run(tmp_path, "lightning.pytorch", "--config", str(again)))["rules"].keys() == {
        "non_finite",
        "large-loss",
    }


def test_help_explains_every_argument(tmp_path: Path) -> None:
    said = " ".join(
        run(tmp_path, "pytorch_lightning", "--trainer.callbacks.help", "gradwatch.callbacks.GradWatch").split()
    )
    for words in ("measure at one optimizer step in this many", "a rules file", "told of incidents", "Help for"):
        assert words in said
