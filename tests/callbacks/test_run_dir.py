"""`run_dir` means the same at every door: a folder, True (keep files), False (keep none), None (as this door does)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.callbacks import GradWatch
from gradwatch.callbacks.fabric import GradWatch as FabricGradWatch
from gradwatch.callbacks.transformers import GradWatchCallback
from gradwatch.errors import ConfigError, GradwatchWarning
from gradwatch.rules import NonFinite
from gradwatch.runs import read_run
from gradwatch.sinks import CsvSink, RunFolder
from gradwatch.treatments import Rollback
from gradwatch.watch import run_dir_of

from .test_lightning import trainer
from .test_say import Named


def loop(run_dir: Any) -> Path | None:
    model = nn.Linear(2, 1)
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.1), run_dir=run_dir) as watch:
        return watch.session.run_dir


def test_a_plain_loop_keeps_files_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert loop(None) is loop(False) is None
    assert list(tmp_path.iterdir()) == []
    assert [loop(True), loop(True), loop("mine")] == [tmp_path / n for n in ("gradwatch", "gradwatch-1", "mine")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gradwatch", "gradwatch-1", "mine"]


@pytest.mark.parametrize(
    ("given", "kept", "found"),
    [
        (None, None, None),
        (False, "logs", None),
        (None, "logs", "logs/name"),
        (True, "logs", "logs/name"),
        (True, None, "name"),
        ("here", "logs", "here"),
    ],
)
def test_each_value_means_one_thing(given: Any, kept: str | None, found: str | None) -> None:
    folder = run_dir_of(given, "name", None if kept is None else Path(kept))
    assert folder == (None if found is None else Path.cwd() / found)


def test_true_keeps_files_of_a_trainer_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    callback = GradWatch(run_dir=True, verbose=False)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), batch_size=4)
    trainer(tmp_path, callback, default_root_dir=None, logger=False, enable_checkpointing=False).fit(Named(), data)
    assert (tmp_path / "gradwatch" / "meta.json").is_file()


@pytest.mark.parametrize("door", [GradWatch, GradWatchCallback, FabricGradWatch, loop])
def test_what_is_no_folder_is_an_error_at_the_door(door: Any) -> None:
    with pytest.raises(ConfigError, match=r"`run_dir` takes a folder, True, False or None\. Got 3"):
        door(run_dir=3)


@pytest.mark.parametrize("door", [GradWatch, GradWatchCallback, FabricGradWatch, loop])
def test_an_empty_name_is_no_folder_and_least_of_all_the_working_directory(
    door: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"`run_dir` takes a folder, True, False or None\. Got ''"):
        door(run_dir="")
    assert list(tmp_path.iterdir()) == []


def trained(watch: Watch, model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        loss = model(torch.ones(2, 2)).square().mean()
        loss.backward()
        watch.step(loss=loss)
        watch.optimizers[0].zero_grad()


@pytest.mark.parametrize("rules", ["default", [NonFinite(then=Rollback(storage="disk"))]])
def test_a_folder_stays_where_it_was_when_the_working_directory_changes(
    rules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(2, 1)
    sinks = [CsvSink("metrics.csv"), RunFolder("another")]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, rules=rules, run_dir="run", sinks=sinks, log_every=1) as watch:
        trained(watch, model, 5)
        monkeypatch.chdir(tmp_path / "elsewhere")
        trained(watch, model, 300)
        with torch.no_grad():
            model.weight.fill_(float("nan"))
        trained(watch, model, 1)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    for folder in ("run", "another"):
        run = read_run(tmp_path / folder)
        assert (run.health.state, [*run.records()][-1].step) == ("complete", 305)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[-1].startswith("305,")


def test_the_wave_of_the_shell_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert loop("~/runs/1") == tmp_path / "home" / "runs" / "1"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_working_directory_that_is_gone_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert loop(tmp_path / "kept") == tmp_path / "kept"
    with pytest.warns(GradwatchWarning, match="No such file"):
        loop("lost")
