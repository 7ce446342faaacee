"""A LightningCLI program: `python cli_program.py PACKAGE fit --config FILE`. Prints what the callback was made of."""

import json
import sys
from importlib import import_module

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

package = sys.argv.pop(1)
pl = import_module(package)
LightningCLI = import_module(f"{package}.cli").LightningCLI


class Net(pl.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.layers(x) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)


if __name__ == "__main__":
    cli = LightningCLI(Net, Data, save_config_callback=None)
    (watch,) = (c for c in cli.trainer.callbacks if type(c).__name__ == "GradWatch")
    rules = {r.name: [type(r).__name__, r.severity, [t.name for t in r.then]] for r in watch.settings.book.rules}
    base = isinstance(watch, pl.Callback)
    print("FOUND " + json.dumps({"rules": rules, "records": len(watch.history), "is_callback": base}))
