"""Three lines in a plain training loop: `Watch`, `watch.step`, and a look at what was found.

A parameter is missing from the optimizer. Nothing crashes, the loss even falls; gradwatch names the layer.

    python examples/plain_loop.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from gradwatch import Watch


def main(arguments: list[str] | None = None) -> Watch:
    """Train, print what gradwatch saw, and return the watch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--run-dir", default=None, help="write records and incidents there")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    forgotten = model[2]
    held = [p for module in model if module is not forgotten for p in module.parameters()]
    optimizer = torch.optim.AdamW(held, lr=1e-3)
    loss_fn = nn.CrossEntropyLoss()

    with Watch(model, optimizer, run_dir=options.run_dir) as watch:
        for _ in range(options.steps):
            rows = torch.randint(0, len(x), (64,))
            outputs = model(x[rows])
            loss = loss_fn(outputs, y[rows])
            loss.backward()
            watch.step(loss=loss, batch=x[rows], outputs=outputs, targets=y[rows])
            optimizer.zero_grad()
            model.zero_grad()
    print(watch.summary())
    return watch


if __name__ == "__main__":
    main()
