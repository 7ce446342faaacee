"""What the pages take for granted of the reader's own: a model, a loader, a rule, a run to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gradwatch import Watch
from gradwatch.records import Index, StepRecord
from gradwatch.rules import Rule
from gradwatch.treatments import BaseTreatment


class Net(pl.LightningModule):
    """A two-layer classifier."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Blocks(nn.Sequential):
    """A model whose paths read like a transformer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)))
        self.head = nn.Linear(8, 3)


class MyRule(Rule):
    """Flags a loss above a limit."""

    bar: float = 3.0

    def judge(self, record, state):
        return self.whole(record, record.loss > self.bar, record.loss, self.bar), state


class MyTreatment(BaseTreatment):
    """Scales by a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def apply_(self, grads, context):
        grads.mul_(torch.where(torch.as_tensor(context.trigger), self.factor, 1.0))


class MySink:
    """Writes a line per record."""

    every = 1

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, None

    def open(self, meta) -> None:
        self.file = self.file or self.path.open("a")

    def write(self, record, window) -> None:
        self.file.write(f"{record.step} {record.global_norm}\n")

    def incident(self, incident) -> None:
        self.file.write(f"{incident}\n")

    def flush(self) -> None:
        if self.file:
            self.file.flush()

    def close(self) -> None:
        if self.file:
            self.file.close()
        self.file = None


def common() -> dict[str, Any]:
    """Return the names that every page may use."""
    torch.manual_seed(0)
    model = Blocks()
    x, y = torch.randn(64, 4), torch.randint(0, 3, (64,))
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    return {
        "MyRule": MyRule,
        "MyTreatment": MyTreatment,
        "MySink": MySink,
        "records_that_make_it_fire": [
            StepRecord(step=i, index=Index.of_parameters(["w"]), loss=5.0 if i > 20 else 1.0) for i in range(40)
        ],
        "Net": Net,
        "MyModel": Blocks,
        "model": model,
        "module": Net(),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "loss_fn": nn.CrossEntropyLoss(),
        "loader": loader,
        "batch": (x[:16], y[:16]),
        "x": x[:16],
        "y": y[:16],
    }


def write_runs(folder: Path) -> None:
    """Write runs/1 and runs/2, as the pages call them."""
    for name, seed in (("1", 0), ("2", 1)):
        torch.manual_seed(seed)
        model = Blocks()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with Watch(model, optimizer, run_dir=folder / "runs" / name) as watch:
            for _ in range(6):
                loss = model(torch.randn(16, 4)).square().mean()
                loss.backward()
                watch.step(loss=loss)
                optimizer.zero_grad()
