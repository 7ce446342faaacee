"""Norms and shares sample by sample, against one backward for each sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradwatch.errors import ConfigError, UnknownNameError
from gradwatch.samples import per_sample_gradients

from .models import PROBLEMS, problem


def one_by_one(model, loss_fn, x, y):
    """Return norms and shares from a backward for each sample alone."""
    params, size = list(model.parameters()), len(x)
    whole = torch.cat([g.flatten() for g in torch.autograd.grad(loss_fn(model(x), y), params)]).double()
    losses = [loss_fn(model(x[i : i + 1]), y[i : i + 1]) for i in range(size)]
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(loss / size, params)]).double() for loss in losses]
    each = torch.stack(rows)
    dots = each @ whole
    return each.norm(dim=1).numpy(), (dots / dots.sum()).numpy(), torch.stack(losses).detach().double().numpy()


@pytest.mark.parametrize("name", PROBLEMS)
def test_norms_shares_and_losses_are_those_of_each_sample_alone(name: str) -> None:
    model, loss_fn, x, y = problem(name)
    norms, shares, losses = one_by_one(model, loss_fn, x, y)
    found = per_sample_gradients(model, loss_fn, x, y)
    assert found.method == "graph"
    assert found.is_checked
    assert found.coverage == pytest.approx(1)
    np.testing.assert_allclose(found.norm, norms, rtol=1e-4)
    np.testing.assert_allclose(found.share, shares, atol=1e-5)
    np.testing.assert_allclose(found.loss, losses, rtol=1e-5)
    assert found.share.sum() == pytest.approx(1)
    assert (np.abs(found.cosine) <= 1 + 1e-6).all()


@pytest.mark.parametrize("name", ["mlp", "cnn", "series", "parameters-of-no-layer"])
def test_torch_func_says_the_same(name: str) -> None:
    given = problem(name)
    found, reference = (per_sample_gradients(*given, method=m) for m in ("auto", "func"))
    np.testing.assert_allclose(found.norm, reference.norm, rtol=1e-4)
    np.testing.assert_allclose(found.share, reference.share, atol=1e-5)
    np.testing.assert_allclose(found.cosine, reference.cosine, rtol=1e-4, atol=1e-5)


def test_of_places_of_a_sequence_the_shares_sum_to_the_samples() -> None:
    model, loss_fn, x, y = problem("gpt")
    # Only what is used place by place: no biases, no gains.
    for name, p in model.named_parameters():
        p.requires_grad = name.endswith("weight") and "norm" not in name and "places" not in name
    found = per_sample_gradients(model, loss_fn, x, y)
    assert found.positions is not None
    assert found.positions.shape == (12, 8)
    np.testing.assert_allclose(found.positions.sum(1), found.share, atol=1e-5)
    assert found.losses is not None
    np.testing.assert_allclose(found.losses.mean(1), found.loss, rtol=1e-6)


def test_a_wrong_token_is_found_with_its_place() -> None:
    model, loss_fn, x, y = problem("gpt")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    y = (x + 1) % 20
    for _ in range(60):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    y[7, 3] = (y[7, 3] + 5) % 20
    first = per_sample_gradients(model, loss_fn, x, y).top(1)[0]
    assert (first.index, first.position) == (7, 3)
    assert first.share > 0.9
    assert str(first).startswith("sample 7 carries ")
    assert str(first).endswith("most of it at position 3")


def test_dropout_drops_the_same_as_in_the_pass_that_is_taken_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    x, y = torch.randn(8, 6), torch.randn(8, 1)
    state = torch.get_rng_state()
    F.mse_loss(model(x), y).backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    torch.set_rng_state(state)
    found = per_sample_gradients(model, F.mse_loss, x, y)
    # Projections on the gradient sum to its square, if it is the same gradient.
    assert found.projection.sum() == pytest.approx(float(whole.square().sum()), rel=1e-5)


def test_through_batch_normalisation_the_parts_sum_to_the_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    x, y = torch.randn(12, 6), torch.randn(12, 1)
    found = per_sample_gradients(model, F.mse_loss, x, y)
    whole = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
    assert found.projection.sum() == pytest.approx(sum(float(g.square().sum()) for g in whole), rel=1e-4)
    assert found.coverage == pytest.approx(1)


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Strange(torch.autograd.Function):
    """An operation of somebody's own: a graph says nothing of it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.t() @ grad


class OfStrange(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 16) / 3), nn.Parameter(torch.randn(16, 2) / 4)

    def forward(self, x):
        return Strange.apply(Strange.apply(x, self.first).tanh(), self.second)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(OfStrange, id="operation-of-ones-own"),
        pytest.param(lambda: Checkpointed(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)), id="checkpoint"),
    ],
)
def test_where_the_graph_says_nothing_the_batch_is_halved(make) -> None:
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(64, 6), torch.randn(64, 2)
    y[41] *= 30
    norms, shares, losses = one_by_one(model, F.mse_loss, x, y)
    found = per_sample_gradients(model, F.mse_loss, x, y)
    assert found.method == "halving"
    first = found.top(1)[0]
    assert first.index == 41
    assert first.share == pytest.approx(shares[41], rel=1e-4)
    assert first.norm == pytest.approx(norms[41], rel=1e-4)
    np.testing.assert_allclose(found.loss, losses, rtol=1e-5)


@pytest.mark.parametrize("place", ["inputs", "targets"])
def test_a_sample_that_is_not_finite_comes_first(place: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    x, y = torch.randn(16, 6), torch.randn(16, 1)
    (x if place == "inputs" else y)[5] = torch.nan
    found = per_sample_gradients(model, F.mse_loss, x, y)
    assert found.top(1)[0].index == 5
    if place == "inputs":  # behind the normalisation all are bad: where it began is known
        assert np.flatnonzero(~found.is_finite).tolist() == [5]


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    x, y = torch.randn(16, 6), torch.randn(16, 1)
    called = []
    model[0].weight.register_hook(called.append)
    F.mse_loss(model(x), y).backward()
    called.clear()
    before = [*(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    state = torch.get_rng_state()
    per_sample_gradients(model, F.mse_loss, x, y)
    after = [*(p.grad for p in model.parameters()), *model.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert not called
    F.mse_loss(model(x), y).backward()
    assert len(called) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(
            {"method": "halve"}, UnknownNameError, "there is no `method` 'halve'. Known: auto, func.", id="method"
        ),
        pytest.param(
            {"loss_fn": lambda o, t: o},
            ConfigError,
            "`loss_fn` must return one number, the loss of the whole batch. Got a tensor of shape (4, 1).",
            id="loss",
        ),
        pytest.param(
            {"inputs": "text"}, ConfigError, "`inputs` must hold tensors of samples. Got str without one.", id="inputs"
        ),
    ],
)
def test_what_can_not_be_is_said(change, error, message) -> None:
    given = {"model": nn.Linear(2, 1), "loss_fn": F.mse_loss, "inputs": torch.ones(4, 2), "targets": torch.ones(4, 1)}
    with pytest.raises(error) as info:
        per_sample_gradients(**{**given, **change})
    assert str(info.value) == message


def test_without_a_gradient_there_is_nothing_to_tell_apart() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="no gradient reaches a parameter"):
        per_sample_gradients(model, lambda o, t: (o * 0).sum(), torch.ones(4, 2), torch.ones(4, 1))
