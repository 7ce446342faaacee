"""The anchor: a small regression net and gradients that spike a thousandfold; who is saved, and what a clip costs."""

import statistics
from functools import lru_cache

import pytest
import torch
from torch import nn

from gradwatch.stats import Gradients
from gradwatch.treatments import ClipByGlobalNorm, SkipStep, ZClip

from ._steps import Step

OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=2e-3),
    "sgd-momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
}


@lru_cache(maxsize=64)
def final_loss(build, optimizer: str, spikes=(), seed: int = 0, steps: int = 400) -> float:
    treatment = None if build is None else build()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    named = list(model.named_parameters())
    optim = OPTIMIZERS[optimizer](model.parameters())
    inputs = torch.randn(256, 10)
    targets = torch.sin(inputs.sum(1, keepdim=True))
    for step in range(steps):
        batch = torch.randint(0, 256, (64,))
        optim.zero_grad()
        (model(inputs[batch]) - targets[batch]).square().mean().backward()
        if step in spikes:
            for _, p in named:
                p.grad.mul_(1000)
        context = Step(step=step, optimizers=(optim,))
        if treatment is not None:
            treatment.apply_(Gradients.collect(named), context)
        if not context.vetoes:
            optim.step()
    return float((model(inputs) - targets).square().mean().detach())


def median_loss(build, optimizer: str, spikes=(), seeds: int = 5) -> float:
    return statistics.median(final_loss(build, optimizer, spikes, seed) for seed in range(seeds))


def test_zclip_saves_adamw_from_a_spike() -> None:
    healthy = final_loss(None, "adamw")
    assert final_loss(None, "adamw", (100,)) > 1.3 * healthy
    assert final_loss(ZClip, "adamw", (100,)) < 1.05 * healthy


@pytest.mark.slow
@pytest.mark.parametrize("spikes", [(100,), (100, 150, 200)], ids=["one-spike", "three-spikes"])
def test_adamw_with_zclip_ends_at_the_healthy_loss(spikes) -> None:
    healthy = median_loss(None, "adamw")
    assert median_loss(None, "adamw", spikes) > 1.5 * healthy
    assert median_loss(ZClip, "adamw", spikes) == pytest.approx(healthy, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_healthy_run_loses_nothing_with_zclip(optimizer: str) -> None:
    assert median_loss(ZClip, optimizer) <= 1.05 * median_loss(None, optimizer)


@pytest.mark.slow
def test_sgd_with_momentum_survives_a_spike_with_zclip_or_a_fixed_clip() -> None:
    healthy = median_loss(None, "sgd-momentum")
    assert median_loss(ZClip, "sgd-momentum", (100,)) < 1.2 * healthy
    assert median_loss(ClipToOne, "sgd-momentum", (100,)) < 1.5 * healthy


def ClipToOne() -> ClipByGlobalNorm:
    return ClipByGlobalNorm(1.0)


class SkipSpikes(SkipStep):
    """Behind a rule that fires above a norm of 100."""

    def apply_(self, grads, context):
        context.rule, context.trigger = "exploding", bool(grads.global_norm > 100)
        return super().apply_(grads, context)


def test_a_step_that_is_skipped_behind_a_rule_leaves_the_run_healthy() -> None:
    assert final_loss(SkipSpikes, "adamw", (100,)) < 1.05 * final_loss(None, "adamw")
