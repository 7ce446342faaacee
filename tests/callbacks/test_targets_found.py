"""Lightning: targets reach the rules from the loss itself, whatever form the batch has."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from gradwatch.callbacks import GradWatch


class Odd(LightningModule):
    """Its batch is a triple, and its prediction is no module's output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 6)

    def training_step(self, batch: Any, i: int) -> Tensor:
        weight, (x, y) = batch[0], batch[1:]
        return F.cross_entropy(self.net(x)[:, :3] * weight.mean(), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def rows() -> list[tuple[Tensor, Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.ones(1), torch.randn(4, generator=g), torch.tensor(k % 3)) for k in range(48)]


def fitted(callbacks: list[Any], folder: Path) -> tuple[Odd, list[Any]]:
    pl.seed_everything(0, verbose=False)
    model = Odd()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    trainer.fit(model, DataLoader(rows(), batch_size=12))
    return model, [p.detach().clone() for p in model.parameters()]


def test_what_a_loss_compares_reaches_the_rules_and_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    watch = GradWatch(run_dir=False, verbose=False, history=100)
    _, watched = fitted([watch], tmp_path)
    _, bare = fitted([], tmp_path)
    assert all(map(torch.equal, watched, bare))
    first = watch.history[0]
    assert first.scalars["num_classes"] == 3
    assert abs(first.scalars["cross_entropy"] - first.loss) < 1e-5
    assert first.scalars["baseline_loss"] > 1


class Contrastive(Odd):
    """Its targets stand in no batch: the first place is right by how scores are made."""

    def training_step(self, batch: Any, i: int) -> Tensor:
        out = self.net(batch[1])
        return F.cross_entropy(out, torch.zeros(len(out), dtype=torch.long))


def test_targets_that_only_the_loss_holds_are_alike_by_right(tmp_path: Path) -> None:
    watch = GradWatch(run_dir=False, verbose=False, history=100, activations_every=1)
    Trainer(
        accelerator="cpu",
        max_epochs=4,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    ).fit(Contrastive(), DataLoader(rows(), batch_size=12))
    assert watch.history[0].scalars["targets_of_loss"] == 1
    assert watch.incidents == []


class Validates(Odd):
    def validation_step(self, batch: Any, i: int) -> None:
        self.log("val_loss", self.training_step(batch, i))


def test_inputs_of_the_first_validation_batch_stand_beside_those_of_training(tmp_path: Path) -> None:
    watch = GradWatch(run_dir=False, verbose=False, history=100)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    inputs = [(7 * x, weight, y) for weight, x, y in rows()]
    trainer.fit(Swapped(), DataLoader(inputs, batch_size=12), DataLoader(inputs[:12], batch_size=12))
    (seen,) = [r.scalars for r in watch.history if "val_loss" in r.scalars]
    given = torch.stack([x for x, _, _ in inputs[:12]])
    assert abs(seen["val_input_std"] - given.std(correction=0).item()) < 1e-5
    assert abs(seen["val_input_mean"] - given.mean().item()) < 1e-5


class Swapped(Validates):
    """The inputs come first in its batch."""

    def training_step(self, batch: Any, i: int) -> Tensor:
        x, weight, y = batch
        return super().training_step((weight, x, y), i)
