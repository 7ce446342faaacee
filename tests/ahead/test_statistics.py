"""What leads the loss is measured right, and the rules that read it speak first."""

import math

import pytest
import torch
from torch import nn

from gradwatch import Watch, load_rules
from gradwatch.ahead import AdamUpdateRms, GradientTurn, StepCurvature
from gradwatch.ahead._sampled import ENTRIES, sampled, share
from gradwatch.testing import check_statistic


@pytest.mark.parametrize(
    "statistic", [AdamUpdateRms(), GradientTurn(), StepCurvature()], ids=["rms", "turn", "curvature"]
)
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
    statistics = {s.name for s in load_rules(["default", "ahead"]).statistics}
    assert statistics == {"gradient_turn", "step_curvature", "adam_update_rms", "dormant_units"}


OPTIMIZERS = {
    "sgd": (lambda p, lr: torch.optim.SGD(p, lr), lambda lr: 2 / lr, 0.5),
    "momentum": (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), lambda lr: 3.8 / lr, 0.05),
    "nesterov": (
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
        lambda lr: 3.8 / 2.8 / lr,
        0.198212,
    ),
    "adam": (lambda p, lr: torch.optim.Adam(p, lr, betas=(0.9, 0.95), eps=1e-3), lambda lr: 38 / lr, 0.05),
    "rmsprop": (lambda p, lr: torch.optim.RMSprop(p, lr, alpha=0.9, eps=1e-3), lambda lr: 2 / lr, 0.5),
}
"""What makes them, the largest curvature that they bear, and the share of it that noise gives."""


def metric(optimizer, p):
    """Return what the squared step is measured by: 1, or the root of the second moment and epsilon."""
    (group,), state = optimizer.param_groups, optimizer.state.get(p, {})
    if "exp_avg_sq" in state:
        return (state["exp_avg_sq"].double() / (1 - group["betas"][1] ** state["step"].item())).sqrt() + group["eps"]
    return state["square_avg"].double().sqrt() + group["eps"] if "square_avg" in state else torch.ones(())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_curvature_along_the_step_is_that_of_the_whole_gradient(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    make, limit, noise = OPTIMIZERS[kind]
    optimizer, params = make(model.parameters(), 0.01), list(model.parameters())
    before, expected = None, []
    with Watch(model, optimizer, rules="observe", statistics=["step_curvature"], on_error="raise") as watch:
        for _ in range(4):
            loss = model(torch.randn(8, 5)).square().mean()
            loss.backward()
            now = [(p.detach().double().clone(), p.grad.double()) for p in params]
            if before is not None:
                pairs = list(zip(before, now, strict=True))
                product = sum(((b[0] - a[0]) * (b[1] - a[1])).sum() for a, b in pairs)
                square = sum(
                    ((b[0] - a[0]).square() * metric(optimizer, p)).sum()
                    for (a, b), p in zip(pairs, params, strict=True)
                )
                expected.append(((product / square / limit(0.01)).item() - noise) / (1 - noise))
            before = now
            watch.step(loss=loss)
            optimizer.zero_grad()
    found = [record.scalars.get("step_curvature") for record in watch.history]
    assert found[0] is None
    assert found[1:] == pytest.approx(expected, rel=1e-4)


def descent(kind, share, *, steep=1, steps=160, noise=1e-3):
    """Descend a noisy valley, whose floor lies above 0; after 60 steps the learning rate goes up to a share of what the
    curvature bears."""
    torch.manual_seed(0)
    model = nn.Linear(40, 1, bias=False)
    curvature = torch.cat([torch.ones(steep), torch.full((40 - steep,), 0.02)])
    make, limit, _ = OPTIMIZERS[kind]
    optimizer = make(model.parameters(), 0.2 * limit(1.0))
    losses = []
    with Watch(model, optimizer, rules="ahead") as watch:
        for step in range(steps):
            if step == 60:
                optimizer.param_groups[0]["lr"] = share * limit(1.0)
            loss = (curvature * (model.weight - noise * torch.randn(40)).square()).sum() / 2 + 0.05
            loss.backward()
            watch.step(loss=loss)
            losses.append(loss.item())
            optimizer.zero_grad()
    return watch, losses


@pytest.mark.parametrize(("kind", "share"), [("sgd", 1.03), ("momentum", 1.002)])
def test_overshooting_is_told_before_the_loss_doubles_under_momentum_too(kind, share):
    watch, losses = descent(kind, share)
    doubled = next(s for s in range(60, len(losses)) if losses[s] > 2 * max(losses[40:60]))
    incident = next(i for i in watch.incidents if i.name == "overshooting")
    assert 60 <= incident.first_step <= doubled - 10
    watch, _ = descent(kind, 0.2, steep=20)
    assert not watch.incidents


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_noise_alone_gives_nothing(kind):
    torch.manual_seed(0)
    model = nn.Linear(2000, 1, bias=False)
    optimizer = OPTIMIZERS[kind][0](model.parameters(), 1e-3)
    with Watch(model, optimizer, rules="observe", statistics=["step_curvature"]) as watch:
        for _ in range(80):
            optimizer.zero_grad()
            (model.weight * torch.randn(1, 2000)).sum().backward()
            watch.step()
    found = [record.scalars["step_curvature"] for record in watch.history[40:]]
    assert abs(sum(found) / len(found)) < 0.02


def test_an_optimizer_of_another_kind_is_not_judged_by_curvature():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adagrad(model.parameters(), 0.1)
    with Watch(model, optimizer, rules="observe", statistics=["step_curvature"], on_error="raise") as watch:
        for _ in range(3):
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            watch.step(loss=loss)
    assert not any("step_curvature" in record.scalars for record in watch.history)
