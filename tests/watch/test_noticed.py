"""Faults are noticed, named, and only where there are any."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.watch._judge import Judge


def problem(depth: int = 3, width: int = 32, act: type[nn.Module] = nn.Tanh):
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(10, width), act()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), act()]
    model = nn.Sequential(*layers, nn.Linear(width, 1))
    x = torch.randn(256, 10)
    return model, x, torch.sin(x.sum(1, keepdim=True))


def fit(model, x, y, optimizer, steps, *, spike=None, nan=None, **options):
    generator = torch.Generator().manual_seed(1)
    with Watch(model, optimizer, on_error="raise", **options) as watch:
        for i in range(steps):
            rows = torch.randint(0, len(x), (64,), generator=generator)
            optimizer.zero_grad()
            out = model(x[rows])
            loss = (out - y[rows]).square().mean()
            if i == spike:
                loss = loss * 1000
            if i == nan:
                loss = loss * math.nan
            loss.backward()
            watch.step(loss=loss, batch=x[rows], outputs=out, targets=y[rows])
    return watch


def test_a_healthy_run_has_no_incident() -> None:
    model, x, y = problem()
    watch = fit(model, x, y, torch.optim.AdamW(model.parameters(), lr=2e-3), 300)
    assert watch.incidents == []


def test_a_spike_of_a_thousand_is_exploding_within_two_steps() -> None:
    model, x, y = problem()
    watch = fit(model, x, y, torch.optim.AdamW(model.parameters(), lr=2e-3), 260, spike=200)
    (incident,) = [i for i in watch.incidents if i.rule == "exploding"]
    assert 200 <= incident.first_step <= 202
    assert incident.resolved


class Log(nn.Module):
    """Turns bad once it is told to: the logarithm of a negative number."""

    armed = False

    def forward(self, x):
        return torch.log(-1 - x.square()) if self.armed else x


@pytest.mark.parametrize("autopsy", [False, True])
def test_nan_born_in_a_module_is_named_by_that_module(autopsy: bool) -> None:
    model, x, y = problem()
    model.insert(3, Log())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    every = None if autopsy else 1
    with Watch(model, optimizer, activations_every=every, autopsy=autopsy, on_error="raise") as watch:
        for i in range(12):
            model[3].armed = i == 10
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            watch.after_backward()
            kept = zip(gradients, model.parameters(), strict=True)
            assert all(torch.equal(g.isnan(), p.grad.isnan()) for g, p in kept)
            watch.after_step()
    incident = next(i for i in watch.incidents if i.rule == "non_finite")
    assert incident.first_step == 10
    assert incident.first_path == "3"
    assert incident.severity == "critical"


class Root(nn.Module):
    """Once it is told to: finite forward, while its derivative is not (of the square root, at zero)."""

    armed = False

    def forward(self, x):
        return x + torch.sqrt(x - x.detach()) if self.armed else x


class Square(nn.Module):
    """Makes a model return its loss, so that its backward can be run again."""

    def forward(self, x):
        return x.square().mean()


def test_a_gradient_that_turns_bad_in_backward_alone_is_named_by_where_it_comes_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), Root(), nn.Linear(8, 1), Square())
    x = torch.randn(16, 10)
    options = {"activations_every": None, "autopsy": True, "on_error": "raise"}
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.01), **options) as watch:
        for i in range(4):
            model[2].armed = i == 2
            model.zero_grad()
            model(x).backward()
            watch.after_backward()
            watch.after_step()
    incident = next(i for i in watch.incidents if i.rule == "non_finite")
    # What goes into the module's backward is finite; what comes out is the gradient of the output before it.
    assert (incident.details["phase"], incident.details["born_in"]) == ("backward", "1")
    assert watch.session.engine.autopsy.modules[-1]["output_is_finite"]
    # The case shows the way there, module by module.
    assert [row["path"] for row in incident.case.modules] == ["0", "1", "2", "3", "4", ""]


def test_an_autopsy_changes_no_bit_of_the_run() -> None:
    def run(autopsy: bool):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), Log(), nn.Linear(16, 1))
        x = torch.randn(64, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with Watch(model, optimizer, rules="autoclip", autopsy=autopsy, on_error="raise") as watch:
            for i in range(8):
                model[3].armed = i == 5
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                watch.step(loss=loss)
        return watch, [*model.parameters(), *model.buffers(), torch.get_rng_state()]

    _, (*bare_values, bare_rng) = run(autopsy=False)
    watch, (*values, rng) = run(autopsy=True)
    assert all(torch.equal(a, b) for a, b in zip(values, bare_values, strict=True))
    assert torch.equal(rng, bare_rng)
    assert next(i for i in watch.incidents if i.rule == "non_finite").details["born_in"] == "3"


def test_twenty_sigmoid_layers_are_vanishing() -> None:
    model, x, y = problem(depth=20, act=nn.Sigmoid)
    watch = fit(model, x, y, torch.optim.SGD(model.parameters(), lr=0.1), 260)
    assert "vanishing" in {i.rule for i in watch.incidents}


def test_a_parameter_missing_from_the_optimizer_is_not_updating() -> None:
    model, x, y = problem()
    held = [p for n, p in model.named_parameters() if not n.startswith("2.")]
    watch = fit(model, x, y, torch.optim.AdamW(held, lr=2e-3), 120)
    incident = next(i for i in watch.incidents if i.rule == "not_updating")
    assert set(incident.paths) == {"2.weight", "2.bias"}


@pytest.mark.parametrize("tells", [True, False], ids=["loss-told", "loss-not-told"])
def test_gradients_that_are_never_reset_are_noticed_and_others_are_not(tells: bool) -> None:
    for resets in (True, False):
        model, x, y = problem()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        with Watch(model, optimizer, on_error="raise") as watch:
            for _ in range(40):
                if resets:
                    optimizer.zero_grad()
                loss = (model(x) - y).square().mean()
                loss.backward()
                watch.step(loss=loss if tells else None)
        assert ("grad_not_reset" in {i.rule for i in watch.incidents}) == (not resets)
        assert {record.scalars["grads_kept"] for record in watch.history[1:]} == {float(not resets)}


def test_incidents_are_told_once_when_they_open_and_once_when_they_are_over() -> None:
    told = []
    model, x, y = problem()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    fit(model, x, y, optimizer, 260, spike=200, rules="autoclip", on_incident=told.append)
    assert [(i.rule, i.resolved) for i in told] == [("exploding", False), ("exploding", True)]


@pytest.mark.parametrize("troubled", [(), (False, False), (False, True)], ids=str)
def test_a_run_is_troubled_where_the_rules_of_any_of_its_optimizers_are(troubled: tuple[bool, ...]) -> None:
    judge = Judge.__new__(Judge)
    judge._engines = {i: SimpleNamespace(is_troubled=one) for i, one in enumerate(troubled)}
    assert judge.is_troubled() is any(troubled)
