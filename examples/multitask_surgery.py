"""Two overlaid digits, one net with two heads: plain sum, PCGrad and CAGrad side by side.

Each image shows one digit to the left and another to the right, overlapping, in the manner of MultiMNIST. A shared
trunk feeds one head a side. gradwatch puts on record how often the two tasks' gradients conflict: over the whole trunk
where there is surgery, in its last layer (which is cheap) where conflicts are only measured.

    python examples/multitask_surgery.py
"""

from __future__ import annotations

import argparse
import time
from statistics import fmean

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from gradwatch import Surgery, Watch

METHODS: dict[str, Surgery | None] = {
    "plain sum": None,
    "pcgrad": Surgery("pcgrad"),
    "cagrad": Surgery("cagrad", c=0.5),
}


class TwoDigits(nn.Module):
    """A small trunk of convolutions with one linear head a side."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * 5 * 6, 64),
            nn.ReLU(),
        )
        self.left = nn.Linear(64, 10)
        self.right = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(images)
        return self.left(features), self.right(features)


def overlaid(images: Tensor, labels: Tensor, number: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (number, 1, 10, 12) images of two digits each, and the labels of the left and of the right one."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(0, len(images), (number,), generator=generator)
    right = torch.randint(0, len(images), (number,), generator=generator)
    canvas = torch.zeros(number, 1, 10, 12)
    canvas[:, 0, :8, :8] = images[left]
    canvas[:, 0, 2:, 4:] = torch.maximum(canvas[:, 0, 2:, 4:], images[right])
    return canvas, labels[left], labels[right]


def train(surgery: Surgery | None, data: tuple[Tensor, ...], *, steps: int, seed: int) -> tuple[nn.Module, Watch]:
    """Return the trained net and its watch. Without surgery conflicts are measured all the same."""
    torch.manual_seed(seed)
    model = TwoDigits()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, left, right = data
    measured = 10 if surgery is None else None
    with Watch(model, optimizer, rules="observe", surgery=surgery, conflicts_every=measured, history=steps) as watch:
        for _ in range(steps):
            rows = torch.randint(0, len(images), (64,))
            to_the_left, to_the_right = model(images[rows])
            loss = watch.backward(
                {"left": F.cross_entropy(to_the_left, left[rows]), "right": F.cross_entropy(to_the_right, right[rows])}
            )
            watch.step(loss=loss)
            optimizer.zero_grad()
    return model, watch


@torch.no_grad()
def accuracies(model: nn.Module, data: tuple[Tensor, ...]) -> tuple[float, float]:
    images, *sides = data
    found = [(scores.argmax(1) == side).float().mean() for scores, side in zip(model(images), sides, strict=True)]
    return float(found[0]), float(found[1])


def mean_of(watch: Watch, scalar: str) -> float:
    return fmean(record.scalars[scalar] for record in watch.history if scalar in record.scalars)


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Train with each method, print a table, and return the test accuracies (left, right) by method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(labels)
    learn, test = overlaid(x[:1400], y[:1400], 6000, seed=1), overlaid(x[1400:], y[1400:], 1500, seed=2)

    print(f"{'method':>10}  {'left':>6}  {'right':>6}  {'conflicts':>9}  {'cosine':>6}  {'seconds':>7}")
    results = {}
    for name, surgery in METHODS.items():
        start = time.perf_counter()
        model, watch = train(surgery, learn, steps=options.steps, seed=options.seed)
        results[name] = accuracies(model, test)
        left, right = results[name]
        conflicts, cosine = mean_of(watch, "conflict_rate"), mean_of(watch, "task_cos/left/right")
        took = time.perf_counter() - start
        print(f"{name:>10}  {left:6.1%}  {right:6.1%}  {conflicts:9.0%}  {cosine:6.2f}  {took:7.1f}")
    print("\nNothing here is certain from one seed: try several before believing that a method helps.")
    return results


if __name__ == "__main__":
    main()
