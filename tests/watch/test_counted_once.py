"""Where histograms are due gradients are read once, when backward is over, and what is on record is what they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.stats import _measure, exponent_histograms

CADENCES = {"histograms_every": 1, "updates_every": 1, "activations_every": 1}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def leave(model: nn.Sequential) -> None:
    pass


def clip(model: nn.Sequential) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def replace_one(model: nn.Sequential) -> None:
    model[2].weight.grad = model[2].weight.grad * 0.5


@pytest.mark.parametrize("change", [leave, clip, replace_one])
def test_histograms_are_those_of_the_gradients_as_they_are_when_they_are_measured(change) -> None:
    model = net()
    params = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, rules="observe", **CADENCES) as watch:
        for _ in range(20):
            loss = model(torch.randn(4, 8)).square().mean()
            loss.backward()
            norms = [p.grad.norm().item() for p in params.values()]
            change(model)
            grads = {path: p.grad.clone() for path, p in params.items()}
            record = watch.step(loss=loss).record
            assert record is not None
            for path, counts in record.histograms.items():
                expected = exponent_histograms([grads[path]])[0].numpy()
                np.testing.assert_array_equal(counts.counts, expected)
            places = [record.index.positions[path] for path in grads]
            # Norms are as backward left them.
            np.testing.assert_allclose(record.columns["grad_norm"][places], norms, rtol=1e-5)
            optimizer.zero_grad()


def test_gradients_that_nobody_touches_are_read_once_at_most_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    local = _measure._local
    monkeypatch.setattr(_measure, "_local", lambda pieces, counts: reads.append(counts) or local(pieces, counts))
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, rules="observe", **CADENCES) as watch:
        for step in range(32):
            loss = model(torch.randn(4, 8)).square().mean()
            loss.backward()
            reads.clear()
            watch.step(loss=loss)
            # Since not every change shows, they are measured again at some steps.
            assert len(reads) == (step % 16 == 0), step
            optimizer.zero_grad()
