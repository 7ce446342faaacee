"""What gradwatch prints is never what ends a run."""

import io
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwatch.callbacks import GradWatch
from gradwatch.callbacks._say import say
from gradwatch.watch import free_run_dir

from .test_lightning import trainer


class Named(pl.LightningModule):
    """A module with a name in another script, and one batch that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"\u982d": nn.Linear(4, 4)})

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.parts["\u982d"](batch[0]).square().mean() * (float("nan") if batch_idx == 5 else 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Full(io.TextIOBase):
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def fit(folder: Path) -> pl.Trainer:
    fitted = trainer(folder, GradWatch(run_dir=False))
    fitted.fit(Named(), DataLoader(TensorDataset(torch.randn(80, 4)), batch_size=4))
    return fitted


def test_names_that_stderr_cannot_encode_are_escaped(tmp_path: Path) -> None:
    taken = io.BytesIO()
    with redirect_stderr(io.TextIOWrapper(taken, encoding="ascii", write_through=True)):
        assert fit(tmp_path).global_step == 20
        text = taken.getvalue().decode("ascii")
    assert "non_finite in parts.\\u982d.weight" in text
    assert "global gradient norm" in text


def test_stderr_on_a_full_disk_loses_the_text_and_nothing_else(tmp_path: Path) -> None:
    with redirect_stderr(Full()):
        assert fit(tmp_path).global_step == 20


def test_a_bar_that_can_not_print_a_line_does_not_matter() -> None:
    tried = []

    def refuses(text: str) -> None:
        tried.append(text)
        raise RuntimeError(f"markup in {text}")

    say("gradwatch [/critical]", refuses)
    assert tried == ["gradwatch [/critical]"]


@pytest.mark.parametrize("inside", ["meta.json", "__init__.py"])
def test_folder_that_holds_anything_is_left_alone(inside: str, tmp_path: Path) -> None:
    wanted = tmp_path / "gradwatch"
    assert free_run_dir(wanted) == wanted
    wanted.mkdir()
    assert free_run_dir(wanted) == wanted
    (wanted / inside).touch()
    assert free_run_dir(wanted) == tmp_path / "gradwatch-1"
    (tmp_path / "gradwatch-1").touch()
    assert free_run_dir(wanted) == tmp_path / "gradwatch-2"
