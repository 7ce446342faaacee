"""Updates that are rounded away are counted exactly: against the update in float64, element by element."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradwatch import Watch
from gradwatch.stats import UpdateMeter

NARROW = [torch.bfloat16, torch.float16]


def rounded(values: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """Return numbers of float64 rounded to the nearest of a format, ties to even, by their digits."""
    exact = values.double().numpy()
    digits, least = (8, -133) if dtype is torch.bfloat16 else (11, -24)
    _, exponents = np.frexp(exact)
    unit = np.exp2(np.maximum(exponents - digits, least).astype(float))
    return np.round(exact / unit) * unit


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(NARROW),
    rate=st.sampled_from([2**-13, 2**-10, 2**-7]),
    zeros=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 99),
)
def test_the_share_is_that_of_updates_which_rounding_takes_back(dtype, rate, zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(30, 7, generator=generator).to(dtype)
    grad = torch.randn(30, 7, generator=generator).to(dtype)
    grad[torch.rand(30, 7, generator=generator) < zeros] = 0.0
    # By hand, in float64: what the step is to make of each element, and what the format makes of that.
    wanted = weight.double() - rate * grad.double()
    intended = grad.double() != 0
    lost = (rounded(wanted, dtype) == weight.double().numpy()) & intended.numpy()
    model = nn.Linear(7, 30, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(weight)
    optimizer = torch.optim.SGD(model.parameters(), rate, foreach=False)
    model.weight.grad = grad.clone()
    with Watch(model, optimizer, rules="observe", on_error="raise") as watch:
        watch.step(loss=1.0)
    assert watch.history[0]["update_lost", "weight"] == pytest.approx(lost.sum() / intended.sum().item(), rel=1e-6)


def moved(params, memory, change):
    meter = UpdateMeter(params, memory)
    meter.before()
    with torch.no_grad():
        change()
    return meter.after()


def test_only_what_has_16_bits_and_a_gradient_counts():
    narrow, wide, without = (torch.ones(64, dtype=d) for d in (torch.bfloat16, torch.float32, torch.bfloat16))
    narrow.grad, wide.grad = torch.ones(64, dtype=torch.bfloat16), torch.ones(64)

    def change():
        narrow[:16] += 1

    stats = moved([narrow, wide, without], 2**20, change)
    assert stats.lost.tolist() == [48, 0, 0]
    assert stats.given.tolist() == [64, 0, 0]
    assert moved([wide], 2**20, lambda: None).lost is None


def test_where_copies_do_not_fit_the_share_is_that_of_a_sample():
    param = torch.ones(2**16, dtype=torch.bfloat16)
    param.grad = torch.ones_like(param)

    def change():
        param[::4] += 1

    stats = moved([param], 2**13, change)
    assert 0 < stats.given.item() < 2**13
    assert stats.lost.item() == 0.75 * stats.given.item()
    assert stats.errors is not None


def test_what_is_not_a_number_is_not_lost():
    param = torch.full((8,), float("nan"), dtype=torch.bfloat16)
    param.grad = torch.ones_like(param)
    assert moved([param], 2**20, lambda: None).lost.tolist() == [0]


def test_a_training_in_bfloat16_is_told_and_one_with_float32_weights_is_not():
    def trained(dtype):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
        optimizer = torch.optim.Adam(model.parameters(), 1e-5)
        with Watch(model, optimizer, updates_every=10) as watch:
            for _ in range(40):
                loss = model(torch.randn(16, 8, dtype=dtype)).square().mean()
                loss.backward()
                watch.step(loss=loss)
                optimizer.zero_grad()
        return [i for i in watch.incidents if i.rule == "updates_rounded_away"], watch.history

    (incident,), history = trained(torch.bfloat16)
    assert incident.value > 0.9
    assert "update_lost" in history[10].columns
    none, history = trained(torch.float32)
    assert not none
    assert "update_lost" not in history[10].columns
