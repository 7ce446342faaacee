"""The rules of the preset speak before the loss does, on trainings driven over the edge; and change nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradwatch import Watch

ALL = ["gradient_turn", "step_curvature", "adam_update_rms", "weight_spectra", "dormant_units", "effective_rank"]
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 2e-3),
}


def trained(make, steps, *, begins=None, seed=0, **options):
    """Follow another net on batches of 32; from some step on the learning rate doubles at every 60th."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    teacher = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer, losses = make(model.parameters()), []
    rate = optimizer.param_groups[0]["lr"]
    with Watch(model, optimizer, activations_every=None, updates_every=None, histograms_every=None, **options) as watch:
        for step in range(steps):
            if begins is not None and step >= begins:
                optimizer.param_groups[0]["lr"] = rate * 2 ** ((step - begins) / 60)
            x = torch.randn(32, 20)
            with torch.no_grad():
                y = teacher(x) + 0.1 * torch.randn(32, 1)
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            watch.step(loss)
            losses.append(loss.item())
    return model, watch, losses


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_noise_that_grows_with_the_rate_is_told_before_the_loss_doubles(kind):
    _, watch, losses = trained(OPTIMIZERS[kind], 650, begins=300, rules="ahead")
    level = torch.tensor(losses[200:300]).median().item()
    smooth = [torch.tensor(losses[i - 10 : i + 1]).median().item() for i in range(300, len(losses))]
    doubled = 300 + next(i for i, value in enumerate(smooth) if value > 2 * level)
    told = next(i for i in watch.incidents if i.rule == "steps_too_long")
    assert 300 < told.first_step <= doubled - 10


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_measurements_and_rules_change_nothing(kind):
    plain, _, expected = trained(OPTIMIZERS[kind], 12, rules="observe")
    watched, watch, losses = trained(OPTIMIZERS[kind], 12, rules="ahead", statistics=ALL[3:4] + ALL[5:])
    assert losses == expected
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert {"spectral_norm", "dormant_fraction", "effective_rank"} <= set(watch.history[0].columns)


def test_the_slope_after_a_step_is_that_of_the_gradient_along_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.Adagrad(model.parameters(), 0.1)  # of a kind whose curvature is not known
    before, expected = None, []
    with Watch(model, optimizer, rules="observe", statistics=["step_curvature"], on_error="raise") as watch:
        for _ in range(4):
            model(torch.randn(8, 5)).square().mean().backward()
            now = copy.deepcopy([p.detach().double() for p in model.parameters()])
            if before is not None:
                pairs = zip(model.parameters(), now, before, strict=True)
                expected.append(sum((p.grad.double() * (b - a)).sum().item() for p, b, a in pairs))
            before = now
            watch.step()
            optimizer.zero_grad()
    assert "slope_after_step" not in watch.history[0].scalars
    assert [r.scalars["slope_after_step"] for r in watch.history[1:]] == pytest.approx(expected, rel=1e-4)
    assert not any("step_curvature" in r.scalars for r in watch.history)


class Block(nn.Module):
    """What is added grows with nothing to hold it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.inner(x)


def test_a_residual_stream_that_grows_for_nothing_is_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ModuleList([Block() for _ in range(3)]))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with Watch(model, optimizer, rules=["residual_growing"], activations_every=5, updates_every=None) as watch:
        for step in range(80):
            x = torch.randn(4, 8)
            for block in model[0]:
                x = block(x)
            loss = 1 + step / 1000 + 0 * x.sum()
            loss.backward()
            watch.step(loss)
            with torch.no_grad():
                for block in model[0]:
                    block.inner.weight.mul_(1.05)
    (incident,) = watch.incidents
    assert incident.rule == "residual_growing"
    assert set(incident.paths) <= {"0.0", "0.1", "0.2"}
