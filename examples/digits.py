"""A small convolutional net with BatchNorm and in-place ReLU learns scikit-learn's handwritten digits, watched.

python examples/digits.py              # ten seconds
tensorboard --logdir runs/digits       # then the GradWatch tab
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gradwatch.callbacks import GradWatch


class DigitNet(pl.LightningModule):
    """Three convolutions and a linear head."""

    def __init__(self, *, width: int = 16, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.body = nn.Sequential(
            *self._stage(1, width), *self._stage(width, 2 * width, stride=2), *self._stage(2 * width, 2 * width)
        )
        self.head = nn.Linear(2 * width, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean(dim=(2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        scores = self(images)
        self.log("val_loss", F.cross_entropy(scores, labels))
        self.log("val_accuracy", (scores.argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,500 images to train on and 297 to validate with; pixels in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    return TensorDataset(x[:1500], y[:1500]), TensorDataset(x[1500:], y[1500:])


def main(arguments: list[str] | None = None) -> GradWatch:
    """Train, print what gradwatch saw, and return the callback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    options = parser.parse_args(arguments)
    pl.seed_everything(0, verbose=False)
    train, val = digits()
    watch = GradWatch()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        callbacks=[watch],
        logger=TensorBoardLogger(options.out.parent, name=options.out.name, version=""),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=10,
    )
    model = DigitNet(width=options.width)
    trainer.fit(model, DataLoader(train, batch_size=50, shuffle=True), DataLoader(val, batch_size=297))
    print(f"validation accuracy {float(trainer.callback_metrics['val_accuracy']):.3f}")
    return watch


if __name__ == "__main__":
    main()
