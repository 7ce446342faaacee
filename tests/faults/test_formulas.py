"""Losses by formula, against torch and against slow pairs; and the rule that reads them, live."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwatch import Watch
from gradwatch.watch._formulas import formula_scalars

CLOSE = {"rel": 1e-5}


@pytest.fixture
def scores():
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 1, 2])


def numbers():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(9, 1, generator=generator), torch.randn(9, 1, generator=generator)


def test_errors_of_numbers_are_torchs():
    p, y = numbers()
    found = formula_scalars(p, y)
    assert found["squared_error"].item() == pytest.approx(functional.mse_loss(p, y).item(), **CLOSE)
    assert found["squared_error_of_pairs"].item() == pytest.approx(((p - y[:, 0]) ** 2).mean().item(), **CLOSE)
    assert found["target_variance"].item() == pytest.approx(y.var(correction=0).item(), **CLOSE)


@pytest.mark.parametrize("form", ["indices", "rows"])
def test_cross_entropies_are_torchs(scores, form):
    p, y = scores
    found = formula_scalars(p, y if form == "indices" else functional.one_hot(y, 4).float())
    assert found["cross_entropy"].item() == pytest.approx(functional.cross_entropy(p, y).item(), **CLOSE)
    twice = functional.cross_entropy(p.softmax(1), y)
    assert found["cross_entropy_twice"].item() == pytest.approx(twice.item(), **CLOSE)
    over_batch = functional.nll_loss(p.log_softmax(0), y)
    assert found["cross_entropy_over_batch"].item() == pytest.approx(over_batch.item(), **CLOSE)
    of_probabilities = formula_scalars(p.softmax(1), y)["cross_entropy_of_probabilities"]
    assert of_probabilities.item() == pytest.approx(functional.cross_entropy(p, y).item(), **CLOSE)


def test_ignored_labels_are_not_counted(scores):
    p, y = scores
    y = y.clone()
    y[:3] = -100
    found = formula_scalars(p, y)["cross_entropy"].item()
    assert found == pytest.approx(functional.cross_entropy(p, y).item(), **CLOSE)


@pytest.mark.parametrize(
    ("p", "y"),
    [
        pytest.param((1, 4), (1, 4), id="one-sample"),
        pytest.param((8, 4), (8, 3), id="other-size"),
        pytest.param((2, 2**20), (2, 2**20), id="too-large"),
        pytest.param((), (), id="a-number"),
    ],
)
def test_what_does_not_apply_is_absent(p, y):
    assert formula_scalars(torch.zeros(p), torch.zeros(y)) == {}


def test_formulas_read_nothing_back_to_the_host():
    p = torch.zeros(8, 4, device="meta")
    for pred, target in [
        (p, torch.zeros(8, 4, device="meta")),
        (p, torch.zeros(8, dtype=torch.long, device="meta")),
        (p[:, :1], torch.zeros(8, 1, device="meta")),
    ]:
        found = formula_scalars(pred, target)
        assert any(isinstance(value, torch.Tensor) for value in found.values())
        assert all(value.is_meta for value in found.values() if isinstance(value, torch.Tensor))


def incidents(loss, model, x, y, steps=40):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with Watch(model, optimizer, rules="default", on_error="raise") as watch:
        for step in range(steps):
            chosen = torch.arange(16) + 16 * (step % 4)
            p = model(x[chosen])
            value = loss(p, y[chosen])
            value.backward()
            watch.step(loss=value, batch=x[chosen], outputs=p, targets=y[chosen])
            optimizer.zero_grad()
        return {i.rule: i for i in watch.incidents}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, y: ((p - y[:, 0]) ** 2).mean(), "every prediction is compared with every target (broadcasting)"),
        (functional.mse_loss, None),
        (functional.l1_loss, None),
        (lambda p, y: functional.mse_loss(p, y) + 1e-2 * p.square().mean(), None),
    ],
    ids=["broadcast", "mse", "l1", "penalty"],
)
def test_broadcast_loss_is_told_from_sound_ones(loss, message):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(64, 4)
    found = incidents(loss, model, x, x.sum(1, keepdim=True)).get("mistaken_loss")
    assert (found.message if found else None) == message


@pytest.mark.parametrize(
    ("last", "loss", "message"),
    [
        (nn.Identity(), functional.cross_entropy, None),
        (nn.Softmax(-1), functional.cross_entropy, "softmax outputs are given to a loss that takes logits"),
        (nn.Softmax(-1), lambda p, y: functional.nll_loss(p.clamp_min(1e-9).log(), y), None),
        (
            nn.Identity(),
            lambda p, y: functional.nll_loss(p.log_softmax(0), y),
            "softmax is taken over the batch, not over the classes",
        ),
    ],
    ids=["logits", "softmax-twice", "probabilities", "over-the-batch"],
)
def test_mistaken_softmax_is_told_from_sound_ones(last, loss, message):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), last)
    x = torch.randn(64, 4)
    found = incidents(loss, model, x, x[:, :3].argmax(1)).get("mistaken_loss")
    assert (found.message if found else None) == message
