"""What leads the loss is measured right, and the rules that read it speak first."""

import math

import pytest
import torch
from torch import nn

from gradwatch import Watch, load_rules
from gradwatch.ahead import AdamUpdateRms, GradientTurn
from gradwatch.ahead._sampled import ENTRIES, sampled, share
from gradwatch.testing import check_statistic


@pytest.mark.parametrize("statistic", [AdamUpdateRms(), GradientTurn()], ids=["rms", "turn"])
def test_the_laws_of_statistics_hold(statistic):
    check_statistic(statistic)


def valley(curvature, rate, steps, optimizer=torch.optim.SGD, **options):
    """Descend a quadratic with one steep direction and many flat ones."""
    torch.manual_seed(0)
    model = nn.Linear(40, 1, bias=False)
    made = optimizer(model.parameters(), rate, **options)
    weights = torch.cat([torch.tensor([curvature]), torch.full((39,), 0.02)])
    losses = []
    with Watch(model, made, rules=["ahead"]) as watch:
        for _ in range(steps):
            loss = (weights * model.weight.square()).sum() / 2
            loss.backward()
            watch.step(loss=loss)
            losses.append(loss.item())
            made.zero_grad()
    return watch, losses


def test_overshooting_is_told_long_before_the_loss_doubles():
    watch, losses = valley(1.0, 2.06, 120)
    doubled = next(step for step, loss in enumerate(losses) if loss > 2 * min(losses[: step + 1]))
    incident = next(i for i in watch.incidents if i.name == "overshooting")
    assert incident.first_step <= doubled - 10
    assert watch.history[60].scalars["gradient_turn"] < -0.9


def test_a_learning_rate_that_the_curvature_bears_is_not_told():
    watch, _ = valley(1.0, 0.9, 120)
    assert not watch.incidents


def test_the_cosine_is_that_of_whole_gradients_where_all_entries_are_seen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    flat = []
    with Watch(model, optimizer, rules="observe", statistics=["gradient_turn"]) as watch:
        for _ in range(4):
            loss = model(torch.randn(8, 6)).square().mean()
            loss.backward()
            flat.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
            watch.step(loss=loss)
            optimizer.zero_grad()
    assert "gradient_turn" not in watch.history[0].scalars
    for step in range(1, 4):
        expected = torch.cosine_similarity(flat[step - 1].double(), flat[step].double(), dim=0).item()
        assert watch.history[step].scalars["gradient_turn"] == pytest.approx(expected, rel=1e-6)


def by_hand(grads, beta):
    """Return gradient over the root of Adam's second moment, root mean square, for one parameter's gradients."""
    moment, found = torch.zeros_like(grads[0]), []
    for count, grad in enumerate(grads, 1):
        moment = beta * moment + (1 - beta) * grad.square()
        found.append((grad.square() / (moment / (1 - beta**count))).mean().sqrt().item())
    return found


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_ratio_is_that_of_the_moment_which_the_step_makes(kind):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = kind(model.parameters(), 1e-3, betas=(0.9, 0.95))
    grads = []
    with Watch(model, optimizer, rules="observe", statistics=["adam_update_rms"]) as watch:
        for step in range(6):
            loss = model(torch.randn(8, 6) * (1 + step**2)).square().mean()
            loss.backward()
            grads.append(model.weight.grad.double())
            watch.step(loss=loss)
            optimizer.zero_grad()
    expected = by_hand(grads, 0.95)
    for step in range(1, 6):
        assert watch.history[step]["adam_update_rms", "weight"] == pytest.approx(expected[step], rel=1e-5)
    assert max(expected[1:]) > 1.2


def test_without_a_second_moment_there_is_nothing_to_say():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watch(model, optimizer, rules="observe", statistics=["adam_update_rms"]) as watch:
        for _ in range(3):
            loss = model(torch.randn(4, 3)).square().mean()
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
    assert all("adam_update_rms" not in record.columns for record in watch.history)


def test_gradients_that_leave_float32_are_no_cosine_of_infinity():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with Watch(model, optimizer, rules="observe", statistics=["gradient_turn"]) as watch:
        for _ in range(2):
            loss = (model(torch.ones(4, 3)) * 1e25).sum()
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
    assert watch.history[1].scalars["gradient_turn"] == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(), (0,), (10,), (64, 64), (100, 4096), (3, 70001)])
def test_a_sample_is_spread_over_rows_and_columns_and_stands_for_all(shape):
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    found = sampled(tensor)
    assert found.numel() * share(tensor) >= tensor.numel()
    assert found.numel() <= max(ENTRIES, 1) + 1
    if len(shape) == 2 and tensor.numel() > ENTRIES:
        assert len(set((found % shape[1]).tolist())) > min(shape[1], ENTRIES) / 2
        assert len(set((found // shape[1]).tolist())) >= min(shape[0], ENTRIES) * 0.9


def test_the_preset_can_be_laid_over_another():
    names = {rule.name for rule in load_rules(["default", "ahead"])}
    assert {"exploding", "overshooting", "stale_second_moment"} <= names
    assert {s.name for s in load_rules(["default", "ahead"]).statistics} == {"gradient_turn", "adam_update_rms"}
