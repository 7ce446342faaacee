"""Two-headed LightningModules, and the fits that tests and DDP processes run."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from gradwatch.callbacks import GradWatch
from gradwatch.treatments.surgery import Surgery, split, weights

from .conftest import TwoHeads, batches, task_gramian

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class TwoHeadsModule(pl.LightningModule):
    """`mode` "dict" returns losses by name, "split" calls split and adds a penalty, "manual" steps by itself."""

    def __init__(self, mode: str = "dict", *, b_factor: float = 1.0) -> None:
        super().__init__()
        self.net = TwoHeads()
        self.mode = mode
        self.b_factor = b_factor
        self.automatic_optimization = mode != "manual"

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Any:
        a, b = self.net.losses(*batch)
        if self.mode == "split":
            return split(a=a, b=b) + 1e-3 * sum(p.pow(2).sum() for p in self.net.trunk.parameters())
        if self.mode == "manual":
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(split(a=a, b=b))
            optimizer.step()
            return None
        if self.mode == "plain":
            return a + b
        return {"loss": a + self.b_factor * b, "losses": {"a": a, "b": b}}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class ByHand(TwoHeadsModule):
    """The reference: the user takes the task gradients and returns the weighted sum, without gradwatch."""

    def __init__(self, method: str = "pcgrad", *, mode: str = "dict", scale: float = 1.0) -> None:
        super().__init__(mode)
        self.method = method
        self.scale = scale

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        a, b = self.net.losses(*batch)
        G = task_gramian((self.scale * a, self.scale * b), list(self.net.trunk.parameters())) / self.scale**2
        w = weights(self.method, G, step=self.global_step).tolist()
        total = w[0] * a + w[1] * b
        if self.mode == "split":
            return total + 1e-3 * sum(p.pow(2).sum() for p in self.net.trunk.parameters())
        return total


def loader() -> DataLoader[tuple[Tensor, ...]]:
    columns = [torch.cat(column) for column in zip(*batches(), strict=True)]
    return DataLoader(TensorDataset(*columns), batch_size=32)


def watch(surgery: Surgery | None, **options: Any) -> GradWatch:
    return GradWatch(rules="observe", surgery=surgery, sinks=(), run_dir=False, verbose=False, **options)


def fit(
    module: pl.LightningModule,
    callbacks: tuple[Any, ...] = (),
    *,
    steps: int = 20,
    checkpoint: Any = None,
    data: Any = None,
    **options: Any,
) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": list(callbacks),
        **options,
    }
    trainer = pl.Trainer(**settings)
    trainer.fit(module, loader() if data is None else data, ckpt_path=checkpoint)
    return trainer
