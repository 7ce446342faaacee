from __future__ import annotations

import json

import pytest

from gradwatch.cli import FINE, main
from gradwatch.cli._demo import _free


@pytest.mark.slow
def test_demo_finds_the_planted_fault_and_ends_with_where_to_look(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--fast"]) == FINE
    said = capsys.readouterr().out
    assert "one incident, treated at 40, over at" in " ".join(said.split())
    assert "blocks.1.mlp.2.weight" in said
    assert said.splitlines()[-2:] == [
        "report:       runs/demo/report.html",
        "TensorBoard:  tensorboard --logdir runs/demo    (then the GradWatch tab)",
    ]
    page = (tmp_path / "runs/demo/report.html").read_text()
    assert "The gradient exploded" in page
    assert "a loss summed instead of averaged" in page


@pytest.mark.slow
def test_demo_as_json(tmp_path, capsys) -> None:
    assert main(["demo", "--fast", "--json", "--out", str(tmp_path / "a b")]) == FINE
    told = json.loads(capsys.readouterr().out)
    assert [i["rule"] for i in told["incidents"]] == ["exploding"]
    assert told["losses"]["autoclip"] < told["losses"]["spiked"]
    assert told["tensorboard"] == f"tensorboard --logdir '{tmp_path / 'a b'}'"


def test_demo_writes_into_a_folder_of_its_own(tmp_path) -> None:
    assert _free(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert _free(tmp_path / "demo") == tmp_path / "demo-3"
