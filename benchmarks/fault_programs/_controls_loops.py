"""Healthy programs with recurrence, shared weights, noise of their own, or two players."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam

from ._data import glyphs, one_hot, split, whole
from ._losses import accuracy, cross_entropy, explained, mean_square
from ._nets import mlp
from ._odd_nets import LastState, TiedAutoencoder, Variational
from ._program import Problem, adam, control

__all__ = ["CONTROL_LOOPS"]


def recurrent() -> Problem:
    """Is the sum of a sequence above zero? An LSTM whose outputs feed nothing but its last state."""
    x = RandomState(0).randn(1500, 20, 2).astype(np.float32)
    y = (x[:, :, 0].sum(1) > 0).astype(np.int64)
    model = nn.Sequential(LastState(2, 24), nn.Linear(24, 2))
    return Problem.of(model, split(x, one_hot(y, 2)), cross_entropy, adam(5e-3), 32, 300, accuracy, goal=0.85)


def tied() -> Problem:
    x, _ = glyphs()
    return Problem.of(TiedAutoencoder(784, 32), split(x, x), mean_square, adam(2e-3), 64, 300, explained, goal=0.5)


def variational() -> Problem:
    """A reconstruction plus a divergence that grows while the sum falls."""
    x, _ = glyphs()
    width, code = x.shape[1], 8

    def elbo(p: Tensor, y: Tensor) -> Tensor:
        picture, mean, log_variance = p.split([width, code, code], -1)
        divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(-1)
        return (functional.mse_loss(picture, y, reduction="none").sum(-1) * 10 + divergence).mean()

    def metric(p: Tensor, y: Tensor) -> float:
        return explained(p[:, :width], y)

    return Problem.of(Variational(width, code), split(x, x), elbo, adam(2e-3), 64, 300, metric, goal=0.5)


def gan(watch_of: Callable[..., Any], problem: Problem, *, watches: int) -> float:
    """Two players, an optimizer each, alternating: watched one by one, or as one model with two optimizers.

    Returns:
        1 less the distance between the means of samples and data: 1 is best.
    """
    real, _, _, _ = problem.data
    generator, critic = problem.model["generator"], problem.model["critic"]
    optimizers = [Adam(net.parameters(), lr=1e-3, betas=(0.5, 0.999)) for net in (generator, critic)]
    if watches == 2:
        players = [watch_of(net, opt) for net, opt in zip((generator, critic), optimizers, strict=True)]
    else:
        players = [watch_of(problem.model, optimizers)]
    random = torch.Generator().manual_seed(0)
    ones, zeros = torch.ones(64, 1), torch.zeros(64, 1)
    judge = functional.binary_cross_entropy_with_logits
    for _ in range(problem.steps):
        x = real[torch.randint(len(real), (64,), generator=random)]
        noise = torch.randn(64, 4, generator=random)
        fake = generator(noise)
        critic_loss = judge(critic(x), ones) + judge(critic(fake.detach()), zeros)
        critic.requires_grad_(False)
        generator_loss = judge(critic(fake), ones)
        critic.requires_grad_(True)
        critic_loss.backward()
        generator_loss.backward()
        if watches == 2:
            players[0].step(loss=generator_loss)
            players[1].step(loss=critic_loss)
        else:
            players[0].step(loss=critic_loss + generator_loss)
        for optimizer in optimizers:
            optimizer.zero_grad()
    with torch.no_grad():
        samples = generator(torch.randn(512, 4, generator=random))
    return 1 - (samples.mean(0) - real.mean(0)).norm().item()


def gan_problem(watches: int) -> Problem:
    x = (RandomState(0).randn(1000, 2) * [0.5, 1.0] + [2.0, -1.0]).astype(np.float32)
    model = nn.ModuleDict(
        {
            "generator": mlp([4, 32, 32, 2], ["relu", "relu", "linear"], "he_normal"),
            "critic": mlp([2, 32, 32, 1], ["relu", "relu", "linear"], "he_normal"),
        }
    )
    fit = partial(gan, watches=watches)
    return Problem.of(model, whole(x, x), mean_square, adam(1e-3), 64, 800, explained, goal=0.5, fit=fit)


CONTROL_LOOPS = (
    control("ctl_recurrent", "LSTM", recurrent),
    control("ctl_tied", "tied weights", tied),
    control("ctl_variational", "a loss of two parts", variational),
    control("ctl_gan_two_watches", "two optimizers, a watch each", partial(gan_problem, 2)),
    control("ctl_gan_one_watch", "two optimizers, one watch", partial(gan_problem, 1)),
)
