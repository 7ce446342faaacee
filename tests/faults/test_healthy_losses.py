"""Losses as people write them, over random heads and data: none is called a mistaken one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradwatch import Watch
from gradwatch.rules import LossTerms, MistakenLoss, TargetsShifted, WholeTargets

Made = tuple[Callable[[Tensor, Tensor], Tensor], Tensor]
N, K = 32, 5


def of_numbers(loss: Callable[..., Tensor]) -> Callable[[torch.Generator], Made]:
    return lambda g: (loss, torch.randn(N, K, generator=g))


def of_classes(loss: Callable[..., Tensor]) -> Callable[[torch.Generator], Made]:
    return lambda g: (loss, torch.randint(0, K, (N,), generator=g))


def of_shares(loss: Callable[..., Tensor]) -> Callable[[torch.Generator], Made]:
    return lambda g: (loss, torch.randn(N, K, generator=g).softmax(-1))


def of_flags(loss: Callable[..., Tensor]) -> Callable[[torch.Generator], Made]:
    return lambda g: (loss, torch.randint(0, 2, (N, K), generator=g).float())


def of_counts(loss: Callable[..., Tensor]) -> Callable[[torch.Generator], Made]:
    return lambda g: (loss, torch.poisson(torch.full((N, K), 3.0), generator=g))


HEALTHY = {
    "squared": of_numbers(F.mse_loss),
    "squared-sum": of_numbers(lambda o, y: F.mse_loss(o, y, reduction="sum")),
    "squared-sum-of-units": of_numbers(lambda o, y: (o - y).square().sum(-1).mean()),
    "absolute": of_numbers(F.l1_loss),
    "huber": of_numbers(F.smooth_l1_loss),
    "log-cosh": of_numbers(lambda o, y: torch.log(torch.cosh(o - y)).mean()),
    "squared-with-penalty": of_numbers(lambda o, y: F.mse_loss(o, y) + 0.01 * o.square().mean()),
    "gaussian": of_numbers(lambda o, y: F.gaussian_nll_loss(o, y, torch.ones_like(o))),
    "cosine": of_numbers(lambda o, y: (1 - F.cosine_similarity(o, y)).mean()),
    "noise-to-be-predicted": of_numbers(lambda o, y: F.mse_loss(o, y)),
    "cross-entropy": of_classes(F.cross_entropy),
    "cross-entropy-sum": of_classes(lambda o, y: F.cross_entropy(o, y, reduction="sum")),
    "label-smoothing": of_classes(lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1)),
    "class-weights": of_classes(lambda o, y: F.cross_entropy(o, y, weight=torch.arange(1.0, K + 1))),
    "focal": of_classes(
        lambda o, y: ((1 - (p := F.cross_entropy(o, y, reduction="none")).neg().exp()) ** 2 * p).mean()
    ),
    "margin": of_classes(F.multi_margin_loss),
    "temperature": of_classes(lambda o, y: F.cross_entropy(o / 2, y)),
    "distillation": of_shares(lambda o, y: F.kl_div(o.log_softmax(-1), y, reduction="batchmean")),
    "soft-labels": of_shares(F.cross_entropy),
    "flags": of_flags(F.binary_cross_entropy_with_logits),
    "flags-weighted": of_flags(lambda o, y: F.binary_cross_entropy_with_logits(o, y, pos_weight=torch.full((K,), 3.0))),
    "flags-sum-of-units": of_flags(
        lambda o, y: F.binary_cross_entropy_with_logits(o, y, reduction="none").sum(-1).mean()
    ),
    "soft-margin": of_flags(lambda o, y: F.soft_margin_loss(o, 2 * y - 1)),
    "counts": of_counts(F.poisson_nll_loss),
    "counts-squared": of_counts(F.mse_loss),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", sorted(HEALTHY))
def test_no_healthy_loss_is_called_a_mistaken_one(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    hidden = int(torch.randint(4, 24, (), generator=generator))
    model = nn.Sequential(nn.Linear(6, hidden), [nn.ReLU(), nn.Tanh(), nn.GELU()][hidden % 3], nn.Linear(hidden, K))
    optimizer = [torch.optim.SGD, torch.optim.AdamW][seed](model.parameters(), lr=1e-3)
    rules = [MistakenLoss(), LossTerms(), TargetsShifted(), WholeTargets()]
    with Watch(model, optimizer, rules=rules, activations_every=1) as watch:
        for _ in range(60):
            x = torch.randn(N, 6, generator=generator)
            loss_of, y = HEALTHY[name](generator)
            outputs = model(x)
            loss = loss_of(outputs, y)
            loss.backward()
            watch.step(loss=loss, batch=x, outputs=outputs, targets=y)
            optimizer.zero_grad()
    assert watch.incidents == []
