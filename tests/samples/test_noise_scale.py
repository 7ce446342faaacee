"""The gradient noise scale, against its definition over all samples."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradwatch import Watch
from gradwatch.errors import ConfigError

from .models import problem


def exact(model, loss_fn, x, y) -> tuple[float, float]:
    """Return trace of the covariance of the samples' gradients, and squared norm of their mean, of a whole data set."""
    params = list(model.parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss_fn(model(x[i : i + 1]), y[i : i + 1]), params)])
        for i in range(len(x))
    ]
    each = torch.stack(rows).double()
    return float(each.var(0).sum()), float(each.mean(0).square().sum())


def measured(model, loss_fn, batches, *, parts: int = 1, scaler=None, **options):
    """Return the records of a training that goes nowhere."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"noise_scale": True, "rules": "observe", "on_error": "raise", "scaler": scaler, **options}
    with Watch(model, optimizer, **options) as watch:
        for x, y in batches:
            optimizer.zero_grad()
            for inputs, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
                loss = loss_fn(model(inputs), targets) / parts
                (loss if scaler is None else scaler.scale(loss)).backward()
            watch.step(loss)
    return watch


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt", "lstm"])
@pytest.mark.parametrize("way", ["whole", "micro-batches", "scaled"])
def test_one_measurement_is_the_sample_covariance_of_the_batch(name: str, way: str) -> None:
    model, loss_fn, x, y = problem(name)
    trace, square = exact(model, loss_fn, x, y)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if way == "scaled" else None
    watch = measured(model, loss_fn, [(x, y)], parts=3 if way == "micro-batches" else 1, scaler=scaler)
    scalars = watch.history[0].scalars
    assert scalars["noise_batch_size"] == len(x)
    assert scalars["noise_trace"] == pytest.approx(trace, rel=1e-3)
    assert scalars["noise_squared_norm"] == pytest.approx(square - trace / len(x), rel=1e-3, abs=1e-4 * trace)


def test_the_estimate_comes_to_the_noise_scale_of_the_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(1024, 8)
    y = x[:, :1] + 0.5 * torch.randn(1024, 1)
    trace, square = exact(model, F.mse_loss, x, y)
    rows = [torch.randint(1024, (32,)) for _ in range(160)]
    watch = measured(model, F.mse_loss, [(x[r], y[r]) for r in rows], every=1, activations_every=None)
    told = [r.scalars for r in watch.history if "noise_scale" in r.scalars]
    assert [r.step for r in watch.history if "noise_scale" in r.scalars][:9] == [0, 1, 2, 4, 8, 16, 32, 50, 100]
    last = told[-1]
    assert abs(last["noise_scale"] - trace / square) < 4 * last["noise_scale_error"]
    assert last["noise_scale_error"] < trace / square
    line = next(line for line in watch.summary().splitlines() if line.startswith("critical batch"))
    assert re.fullmatch(
        r"critical batch about \S+x? (of )?yours: gradient noise scale \S+ ± \S+ samples, batch 32", line
    )


def test_nothing_of_the_run_changes_and_nothing_is_measured_when_off() -> None:
    def run(*, noise_scale: bool):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        with Watch(model, optimizer, noise_scale=noise_scale, on_error="raise") as watch:
            for _ in range(12):
                optimizer.zero_grad()
                x = torch.randn(16, 4)
                loss = F.mse_loss(model(x), x[:, :1])
                loss.backward()
                watch.step(loss)
        return watch, [*model.parameters(), *model.buffers(), torch.get_rng_state()]

    on, values = run(noise_scale=True)
    off, bare = run(noise_scale=False)
    assert all(torch.equal(a, b) for a, b in zip(values, bare, strict=True))
    assert any("noise_scale" in r.scalars for r in on.history)
    assert not any("noise_scale" in r.scalars for r in off.history)
    assert not any(line.startswith("critical batch") for line in off.summary().splitlines())


def test_what_is_no_yes_or_no_is_refused() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ConfigError) as info:
        Watch(model, torch.optim.SGD(model.parameters()), noise_scale=5)
    assert str(info.value) == "`noise_scale` must be True or False. Got 5."
