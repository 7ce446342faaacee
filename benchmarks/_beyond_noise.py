"""The gradient noise scale, measured in passing, against the exact one over all samples of a data set."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwatch import Watch
from gradwatch.samples import per_sample_gradients

__all__ = ["rows"]

NUM, SIZE, STEPS = 2048, 32, 801


def exact(model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Return tr(S) / |G|^2 over the whole data set, from the gradient of each sample."""
    squares = sum(
        float((per_sample_gradients(model, loss_fn, a, b, method="func").norm * len(a)).__pow__(2).sum())
        for a, b in zip(x.split(256), y.split(256), strict=True)
    )
    grads = torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))
    square = sum(float(g.double().square().sum()) for g in grads)
    return (squares / len(x) - square) / square


def measured(
    model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> tuple[float, float, float]:
    """Return the estimate, its error, and what a step that measures costs in usual ones, of a training that goes
    nowhere."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    spent: list[float] = []
    with Watch(model, optimizer, rules="observe", noise_scale=True, activations_every=None) as watch:
        for _ in range(STEPS):
            begun = time.process_time()
            chosen = torch.randint(0, len(x), (SIZE,))
            optimizer.zero_grad()
            loss = loss_fn(model(x[chosen]), y[chosen])
            loss.backward()
            watch.step(loss)
            spent.append(time.process_time() - begun)
    cost = statistics.median(spent[50::50]) / statistics.median(spent)
    last = [r.scalars for r in watch.history if "noise_scale" in r.scalars][-1]
    return last["noise_scale"], last["noise_scale_error"], cost


def _trained(model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        chosen = torch.randint(0, len(x), (SIZE,))
        optimizer.zero_grad()
        loss_fn(model(x[chosen]), y[chosen]).backward()
        optimizer.step()


def models() -> dict[str, tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]]:
    x = torch.randn(NUM, 8)
    images = torch.randn(NUM, 1, 8, 8)
    classes = (images.flatten(1)[:, :4].sum(1) > 0).long() + 2 * (images.flatten(1)[:, 4:8].sum(1) > 0).long()
    cnn = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    encoder = nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 8))
    return {
        "linear regression": (nn.Linear(8, 1), F.mse_loss, x, x[:, :1] + torch.randn(NUM, 1)),
        "CNN": (cnn, F.cross_entropy, images, classes),
        "autoencoder with LayerNorm": (encoder, F.mse_loss, x, x),
    }


def rows(seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the table: what, found, asked for."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    for name, (model, loss_fn, x, y) in models().items():
        _trained(model, loss_fn, x, y, steps=60)
        true, (found, error, cost) = exact(model, loss_fn, x, y), measured(model, loss_fn, x, y)
        off = found / true - 1
        yield (
            f"noise scale: {name}",
            f"{found:.3g} ± {error:.2g}, exact {true:.3g} ({off:+.0%}); {cost:.1f} steps",
            "±25 %",
        )
