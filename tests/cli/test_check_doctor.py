from __future__ import annotations

import json

import pytest

from gradwatch.cli import FINE, FOUND, USAGE, main

MODELS = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import pytorch_lightning as pl

x, y = torch.randn(32, 4), torch.randint(0, 3, (32,))

class Net(pl.LightningModule):
    def __init__(self, width=16):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)

class Own(Net):
    def train_dataloader(self):
        return DataLoader(TensorDataset(x, y), batch_size=16)

def data():
    return TensorDataset(x, y)

def good():
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    return model, (x, y), nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=1e-2)

def forgotten():
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    return model, (x, y), nn.CrossEntropyLoss(), torch.optim.Adam(model[2].parameters(), lr=1e-2)

def no_model():
    return 3, (x, y)

def broken():
    raise RuntimeError("no data here")

def mismatched():
    return nn.Linear(5, 3), (x, y), nn.CrossEntropyLoss()
"""


@pytest.fixture
def models(tmp_path):
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    return str(path)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([":good"], id="factory"),
        pytest.param([":Own"], id="module-with-a-loader"),
        pytest.param([":Net", "--batch", ":data", "--init", "width=8"], id="module-and-data-set"),
    ],
)
def test_healthy_models_pass(arguments, models, capsys) -> None:
    given = [models + a if a.startswith(":") else a for a in arguments]
    assert main(["check", *given, "--steps", "10"]) == FINE
    assert capsys.readouterr().out.startswith("Pre-flight: ")


def test_fault_is_named_with_its_cure(models, capsys) -> None:
    assert main(["check", f"{models}:forgotten", "--steps", "0"]) == FOUND
    said = capsys.readouterr().out
    assert "[warning] not_in_optimizer at 0.weight" in said
    assert "What to try: make the optimizer from model.parameters() last" in said
    assert main(["check", f"{models}:forgotten", "--steps", "0", "--fail-on", "critical", "--json"]) == FINE
    told = json.loads(capsys.readouterr().out)
    assert [f["check"] for f in told["findings"] if f["severity"] == "warning"] == ["not_in_optimizer"]
    assert told["ok"] is False


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (":goood", "there is no name 'goood'. Did you mean 'good'"),
        (":no_model", "gives an object of int, which is no model"),
        (":broken", "failed with RuntimeError: no data here ("),
        (":Net", "gives no batch: give one with --batch MODULE:NAME"),
        (":mismatched", "the first pass failed with RuntimeError"),
    ],
)
def test_what_can_not_be_checked_is_one_line(target, words, models, capsys) -> None:
    assert main(["check", models + target]) == USAGE
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_target_must_name_a_module_and_something_in_it(capsys) -> None:
    assert main(["check", "Net"]) == USAGE
    assert capsys.readouterr().err == (
        "gradwatch: give MODULE:NAME, such as package.module:Net or file.py:Net. Got 'Net'.\n"
    )
    assert main(["check", "no_such_package:Net"]) == USAGE
    assert "there is no module 'no_such_package' here, nor installed" in capsys.readouterr().err


def test_doctor_finds_this_installation_well(capsys) -> None:
    assert main(["doctor", "--json"]) == FINE
    told = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert told["self-test"]["state"] == "fine"
    assert "bit for bit" in told["self-test"]["detail"]
    assert told["GradWatch tab"]["state"] == "fine"


def test_doctor_says_what_is_wrong_and_exits_with_1(monkeypatch, capsys) -> None:
    def ill() -> str:
        raise AssertionError("watched training gave other weights")

    monkeypatch.setattr("gradwatch.cli._doctor._self_test", ill)
    assert main(["doctor"]) == FOUND
    said = capsys.readouterr().out
    assert "BAD  self-test" in said
    assert said.endswith("something is wrong: see BAD above\n")
