"""Accelerate with gradient accumulation: `Watch` takes what `accelerator.prepare` returns.

`watch.step` stands where `optimizer.step` stood, waits while gradients accumulate, and skips the batch that is not
finite.

    python examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwatch import Watch


def main(arguments: list[str] | None = None) -> Watch:
    """Train, print what gradwatch saw, and return the watch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--run-dir", default=None, help="write records and incidents there")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))
    x = torch.randn(32 * options.batches, 8)
    x[16 * options.batches] = float("nan")  # one corrupt sample, in the middle
    loader = DataLoader(TensorDataset(x, x.nan_to_num().sum(1, keepdim=True)), batch_size=32)
    model, optimizer, loader = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-3), loader)
    with Watch(model, optimizer, rules="autoclip", run_dir=options.run_dir) as watch:
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                outputs = model(inputs)
                loss = nn.functional.mse_loss(outputs, targets)
                accelerator.backward(loss)
                watch.step(loss, batch=(inputs, targets), outputs=outputs)
                optimizer.zero_grad()
    print(watch.summary())
    return watch


if __name__ == "__main__":
    main()
