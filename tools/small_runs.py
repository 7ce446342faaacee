"""Small real runs for pictures, with what a user gets who sets nothing: a classifier of digits, one fault at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

from gradwatch import Watch

__all__ = ["tasks", "train"]


def network(activation: Callable[[], nn.Module], depth: int = 8, width: int = 64) -> nn.Sequential:
    sizes = [64, *[width] * depth]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def batches(steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(labels)
    for _ in range(steps):
        rows = torch.randint(0, len(x), (64,))
        yield x[rows], y[rows]


def train(folder: Path, fault: str, steps: int = 300, **options: Any) -> Watch:
    """Train the classifier with a fault into a run folder; `options` are the watch's. Returns the watch."""
    torch.manual_seed(0)
    model = network(nn.Sigmoid if fault == "sigmoid" else nn.ReLU)
    if fault == "dead":
        nn.init.constant_(model[8].bias, -20.0)
        for layer in (model[10], model[12], model[14]):  # live on their biases alone
            nn.init.constant_(layer.bias, 0.1)
    held = [p for n, p in model.named_parameters() if fault != "forgotten" or not n.startswith("6.")]
    rate = {"wild": 0.7, "sigmoid": 0.05, "crawl": 1e-5}.get(fault, 0.02)
    optimizer = torch.optim.SGD(held, lr=rate, momentum=0.9 if fault != "wild" else 0.0)
    with Watch(model, optimizer, run_dir=folder, **options) as watch:
        for step, (x, y) in enumerate(batches(steps)):
            outputs = model(x)
            if fault == "nan" and step >= steps // 2:
                outputs = outputs + torch.log(torch.zeros(()))  # the logarithm of an empty class
            # Once summed where it should be averaged.
            how = "sum" if fault == "spike" and step == steps // 2 else "mean"
            loss = nn.functional.cross_entropy(outputs, y, reduction=how)
            loss.backward()
            watch.step(loss=loss, batch=x, outputs=outputs, targets=y)
            model.zero_grad()
    return watch


def tasks(folder: Path, steps: int = 300) -> None:
    """Train one trunk for two tasks that want different things of it: which digit, and how much ink."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
    heads = nn.ModuleDict({"digit": nn.Linear(16, 10), "ink": nn.Linear(16, 1)})
    model = nn.ModuleDict({"trunk": trunk, "heads": heads})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with Watch(model, optimizer, run_dir=folder, surgery="pcgrad") as watch:
        for x, y in batches(steps):
            features = trunk(x)
            digit = nn.functional.cross_entropy(heads["digit"](features), y)
            ink = (heads["ink"](features)[:, 0] - 4 * x.mean(dim=1)).square().mean()
            watch.backward({"digit": digit, "ink": ink})
            watch.step()
            optimizer.zero_grad()
