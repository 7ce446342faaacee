"""Lightning Fabric: the callback watches a loop that does not know of it.

The learning rate is far too high for the last third of the run. Gradwatch says so, and where it began.

    python examples/fabric_loop.py
"""

from __future__ import annotations

import argparse

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwatch.callbacks.fabric import GradWatch


def main(arguments: list[str] | None = None) -> GradWatch:
    """Train, print what gradwatch saw, and return the callback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--run-dir", default=False, help="write records and incidents there")
    options = parser.parse_args(arguments)

    watch = GradWatch(run_dir=options.run_dir)
    fabric = Fabric(accelerator="cpu", callbacks=[watch])
    fabric.seed_everything(0, verbose=False)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))
    x = torch.randn(32 * options.steps, 8)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x, x.square().sum(1, keepdim=True)), batch_size=32))
    for step, (inputs, targets) in enumerate(loader):
        if step == 2 * options.steps // 3:
            for group in optimizer.param_groups:
                group["lr"] = 1.0
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        fabric.call("on_before_backward", loss)  # optional: puts the loss on record
        fabric.backward(loss)
        optimizer.step()
    fabric.call("on_train_end")
    return watch


if __name__ == "__main__":
    main()
