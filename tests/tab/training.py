"""A real Lightning run: a small transformer learns to add digits, well or with a planted fault."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gradwatch.callbacks import GradWatch


class Block(nn.Module):
    """Pre-norm attention and a two-layer network, both residual."""

    def __init__(self, width: int, heads: int, plain: bool) -> None:
        super().__init__()
        self.plain = plain
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        if plain:
            self.act = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:  # no residual and no norm: each sigmoid passes on a quarter of the gradient at most
            return self.down(self.act(self.up(self.attn(x, x, x, need_weights=False)[0])))
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.down(self.act(self.up(self.norm2(x))))


class Adder(pl.LightningModule):
    """Reads digits, tells the last digit of their sum.

    Args:
        fault: "" trains well; "bad-batch": one batch has a loss 400 times too large; "sigmoid": no residuals, no norms.
    """

    def __init__(self, *, fault: str = "", depth: int = 6, width: int = 32, bad_step: int = 220) -> None:
        super().__init__()
        self.fault, self.bad_step = fault, bad_step
        self.wte, self.wpe = nn.Embedding(10, width), nn.Parameter(0.02 * torch.randn(6, width))
        self.h = nn.ModuleList(Block(width, 4, fault == "sigmoid") for _ in range(depth))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, digits: Tensor) -> Tensor:
        x = self.wte(digits) + self.wpe
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x).mean(dim=1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        digits, sums = batch
        loss = F.cross_entropy(self(digits), sums)
        if self.fault == "bad-batch" and self.global_step in (self.bad_step, self.bad_step + 1):
            loss = 400 * loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


DENSE = {"activations_every": 10, "updates_every": 10, "histograms_every": 10}


def train(
    folder: Path,
    name: str,
    *,
    fault: str = "",
    steps: int = 400,
    bad_step: int = 220,
    options: Mapping[str, Any] = DENSE,
    log_every: int = 1,
) -> GradWatch:
    """Train for a number of steps into `folder/name`; `options` are the callback's, which is returned."""
    pl.seed_everything(0, verbose=False)
    digits = torch.randint(0, 10, (6400, 6))
    data = TensorDataset(digits, digits[:, :2].sum(dim=1) % 10)
    callback = GradWatch("autoclip", verbose=False, **options)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[callback],
        log_every_n_steps=log_every,
        logger=TensorBoardLogger(str(folder), name="", version=name),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Adder(fault=fault, bad_step=bad_step), DataLoader(data, batch_size=32, shuffle=True))
    return callback
