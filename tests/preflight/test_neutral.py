"""Afterwards everything is as it was, bit for bit."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Adam

from gradwatch._preflight import preflight


class Odd(nn.Module):
    """BatchNorm, dropout, a counter, a buffer that is replaced, a frozen layer, in-place ReLU."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.3)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.last = nn.Linear(16, 4)
        self.register_buffer("mean", torch.zeros(16))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.drop(self.act(self.norm(self.first(x))))
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        random.random()
        np.random.rand()
        return self.last(self.frozen(x) + self.mean)


def states(model, optimizer):
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "ids": {k: id(v) for k, v in model.state_dict(keep_vars=True).items()},
        "grads": {k: (p.grad if p.grad is None else p.grad.clone(), id(p.grad)) for k, p in model.named_parameters()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "calls": model.calls,
        "rng": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "optimizer": {k: dict(v) for k, v in optimizer.state.items()},
        "lr": [g["lr"] for g in optimizer.param_groups],
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def trained(images):
    torch.manual_seed(0)
    model = Odd()
    optimizer = Adam(model.parameters(), 1e-2)
    nn.functional.cross_entropy(model(images[0]), images[1]).backward()
    optimizer.step()
    model.drop.eval()
    return model, optimizer


def test_nothing_is_changed(trained, images):
    model, optimizer = trained
    before = states(model, optimizer)
    report = preflight(model, images, nn.CrossEntropyLoss(), optimizer)
    after = states(model, optimizer)
    assert {k for k in before if not same(before[k], after[k])} == set()
    assert report.measures["loss_after_overfit"] < report.measures["loss"]


def test_nothing_is_changed_when_the_loss_raises_half_way(trained, images):
    model, optimizer = trained
    before = states(model, optimizer)
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("no more")
        return nn.functional.cross_entropy(outputs, targets)

    with pytest.raises(RuntimeError, match="no more"):
        preflight(model, images, loss, optimizer)
    after = states(model, optimizer)
    assert {k for k in before if not same(before[k], after[k])} == set()


def test_training_goes_on_as_without_it(images):
    def train(check):
        torch.manual_seed(3)
        model = Odd()
        optimizer = Adam(model.parameters(), 1e-2)
        if check:
            preflight(model, images, nn.CrossEntropyLoss(), optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[0]), images[1]).backward()
            optimizer.step()
        return model.state_dict()

    assert same(dict(train(check=True)), dict(train(check=False)))


def test_snapshot_restores_what_the_body_spoils(images):
    from gradwatch._preflight import unchanged

    model = Odd()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with unchanged(model):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        model.extra = nn.Linear(2, 2)
        model.first.register_forward_hook(lambda *_: None)
        model.eval()
    assert same(before, dict(model.state_dict()))
    assert not hasattr(model, "extra")
    assert not model.first._forward_hooks
    assert model.training
