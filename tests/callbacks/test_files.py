"""What a watched Trainer leaves on disk: what it would leave unwatched, and a run folder where it keeps its logs."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from torch.utils.data import DataLoader, TensorDataset

from gradwatch.callbacks import GradWatch
from gradwatch.runs import read_run


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean() * (float("nan") if batch_idx == 2 else 1.0)

    def validation_step(self, batch, batch_idx):
        return self.layer(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def data() -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(12, 4)), batch_size=4)


def run(*callbacks: Any, do: str = "fit", **options: Any) -> None:
    settings = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    if options.get("barebones"):
        settings = {"max_epochs": 1, "accelerator": "cpu"}
    trainer = pl.Trainer(callbacks=list(callbacks), **{**settings, **options})
    getattr(trainer, do)(Line(), data())


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing-asked-for": {"logger": False, "enable_checkpointing": False},
    "checkpoints": {"logger": False},
    "fast-dev-run": {"fast_dev_run": 2, "default_root_dir": "root"},
    "barebones": {"barebones": True, "default_root_dir": "root"},
    "a-logger-without-folder": {"logger": DummyLogger(), "enable_checkpointing": False},
    "validation-alone": {"do": "validate", "default_root_dir": "root", "logger": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_trainer_without_a_logger_leaves_the_same_files_watched_and_bare(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []
    for name, callbacks in (("bare", []), ("watched", [GradWatch(on_error="raise")])):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        run(*callbacks, **options)
        left.append(files(folder))
    assert left[0] == left[1]


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_root_folder_that_the_trainer_was_given_gets_the_run_folder_and_the_working_directory_nothing(
    checkpoints: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    watch = GradWatch(verbose=False)
    run(watch, logger=False, enable_checkpointing=checkpoints, default_root_dir=tmp_path / "root")
    assert watch.run_dir == tmp_path / "root" / "gradwatch"
    assert len(list(read_run(watch.run_dir).records())) == 3
    assert files(tmp_path / "cwd") == set()


def test_a_folder_that_is_named_is_written_whatever_the_trainer_writes(tmp_path: Path) -> None:
    run(GradWatch(run_dir=tmp_path / "mine"), logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    assert len(list(read_run(tmp_path / "mine").records())) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("run_dir", [None, False])
def test_incidents_that_were_not_written_are_said_so_where_that_was_not_asked_for(
    run_dir: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(GradWatch(run_dir=run_dir), logger=False, enable_checkpointing=False)
    line = "gradwatch wrote no files: the Trainer has no log folder. `run_dir=` names a folder for them\n"
    assert (line in capsys.readouterr().err) == (run_dir is None)


def test_with_a_logger_that_has_no_folder_files_go_where_checkpoints_go(tmp_path: Path) -> None:
    watch = GradWatch(verbose=False)
    run(watch, logger=DummyLogger(), default_root_dir=tmp_path)
    assert watch.run_dir == tmp_path / "gradwatch"
    assert (tmp_path / "gradwatch" / "meta.json").exists()
