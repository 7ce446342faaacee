"""A vetoed step moves nothing, whatever the optimizer does; what it moved all the same is put back, or told."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.errors import ConfigError, TrainingStopped
from gradwatch.rules import NonFinite
from gradwatch.testing import MemorySink
from gradwatch.treatments import ClipByGlobalNorm, LowerLearningRate, SkipStep
from gradwatch.watch import Inventory, Undo

SKIP: dict[str, Any] = {"rules": [NonFinite(then=SkipStep())], "on_error": "raise"}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def batch(i: int) -> torch.Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(i))


def backward(model: nn.Module, i: int, *, bad: bool = False) -> torch.Tensor:
    loss = (model(batch(i)) - 0.5).square().mean() * (math.nan if bad else 1.0)
    loss.backward()
    return loss.detach()


def contents(model: nn.Module, optimizer: Any) -> list[tuple[str, Any]]:
    paths = {id(p): path for path, p in model.named_parameters()}
    return Inventory([optimizer], lambda tensor: paths.get(id(tensor))).contents()


def told(watch: Watch, rule: str) -> list[Any]:
    return [i for i in watch.incidents if i.rule == rule]


class Restless(torch.optim.Optimizer):
    """Moves weights, state and numbers of every kind at every step, by ways that no version counter shows."""

    num_all = 0
    table: ClassVar[list[int]] = []

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01, "k": 0})
        self.num_steps, self.log, self.names = 0, [], {"best": math.inf}
        self.generator, self.inner = torch.Generator().manual_seed(3), _Counter()

    def step(self, closure: Any = None) -> None:
        self.num_steps += 1
        Restless.num_all += 1
        Restless.table.append(self.num_steps)
        self.inner.count += 1
        self.log.append(self.num_steps)
        self.names["best"] = min(self.names["best"], 1 / self.num_steps)
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                state = self.state[p]
                state["sum"] = state.get("sum", torch.zeros_like(p.data)) + p.grad
                noise = torch.randn(p.shape, generator=self.generator) + torch.randn(p.shape)
                p.data = p.data - group["lr"] * (state["sum"] + 1e-3 * noise)


class TakesTurns(Restless):
    """Puts another parameter first at every step, by a list of its own making."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            first, *others = group["params"]
            group["params"] = [*others, first]


class _Counter:
    def __init__(self) -> None:
        self.count = 0


class TwoCalls(torch.optim.Optimizer):
    """Climbs, then steps from where it stood; it has no `step`."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def first(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["shift"] = 0.05 * p.grad
            p.add_(self.state[p]["shift"])
        self.zero_grad()

    @torch.no_grad()
    def second(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(self.state[p]["shift"]).sub_(p.grad, alpha=0.05)


class PullsBack:
    """No torch optimizer: moves weights when the one that it holds is done."""

    def __init__(self, fast: torch.optim.Optimizer) -> None:
        self.fast, self.count = fast, 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.fast.param_groups

    def zero_grad(self) -> None:
        self.fast.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        self.fast.step()
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.99)


def train(make: Callable[[nn.Module], Any], steps: list[int], bad: int | None, **options: Any) -> tuple[Any, Any, Any]:
    model = net()
    optimizer = make(model)
    watch = Watch(model, optimizer, **{**SKIP, **options})
    torch.manual_seed(1)
    for i in steps:
        optimizer.zero_grad()
        watch.step(loss=backward(model, i, bad=i == bad))
    watch.close()
    return model, optimizer, watch


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda m: Restless(m.parameters()), id="restless"),
        pytest.param(lambda m: TakesTurns(m.parameters()), id="takes-turns"),
        pytest.param(lambda m: PullsBack(torch.optim.Adam(m.parameters(), lr=0.01)), id="wrapper-that-is-no-optimizer"),
        pytest.param(lambda m: torch.optim.Adam(m.parameters(), lr=0.01, fused=True), id="fused"),
    ],
)
@pytest.mark.parametrize("bad", [0, 4])
def test_a_vetoed_step_leaves_everything_as_if_its_batch_had_never_been(make: Any, bad: int) -> None:
    found = train(make, list(range(8)), bad)
    expected = train(make, [i for i in range(8) if i != bad], None)
    assert contents(*found[:2]) == contents(*expected[:2])
    assert [r.skipped for r in found[2].history].count(True) == 1
    assert not told(found[2], "veto_unproven")


def test_what_was_put_back_is_told_once_and_counted() -> None:
    model = net()
    optimizer = Restless(model.parameters())
    sink = MemorySink()
    with Watch(model, optimizer, sinks=[sink], **SKIP) as watch:
        for i in range(6):
            optimizer.zero_grad()
            watch.step(loss=backward(model, i, bad=i in (2, 4)))
        (incident,) = told(watch, "veto_undone")
    assert [(i.last_step, i.count) for i in sink.incidents if i.rule == "veto_undone"] == [(4, 2)]
    assert (incident.severity, incident.first_step, incident.last_step, incident.count) == ("info", 2, 4, 2)
    assert {"0.weight", "num_steps of Restless", "k of group 0", "count of Restless.inner"} <= set(
        incident.details["moved"]
    )


def test_nothing_is_told_of_an_optimizer_that_moves_nothing() -> None:
    *_, watch = train(lambda m: torch.optim.AdamW(m.parameters(), lr=0.01), list(range(6)), 3)
    assert {i.rule for i in watch.incidents} == {"non_finite"}


def test_two_calls_without_a_step_are_taken_back() -> None:
    def run(steps: list[int], bad: int | None) -> tuple[Any, Any]:
        model = net()
        optimizer = TwoCalls(model.parameters())
        with Watch(model, optimizer, **SKIP) as watch:
            for i in steps:
                optimizer.zero_grad()
                watch.after_backward(backward(model, i, bad=i == bad))
                optimizer.first()
                backward(model, i, bad=i == bad)
                optimizer.second()
                watch.after_step()
        return model, optimizer

    assert contents(*run(list(range(7)), 3)) == contents(*run([0, 1, 2, 4, 5, 6], None))


def test_a_decision_in_the_midst_of_an_optimizers_algorithm_puts_no_half_way_weights_back() -> None:
    model = net()
    optimizer = TwoCalls(model.parameters())
    with Watch(model, optimizer, **SKIP) as watch:
        before = [p.detach().clone() for p in model.parameters()]
        backward(model, 0)
        optimizer.first()
        watch.after_backward(backward(model, 0, bad=True))
        optimizer.second()
        watch.after_step()
    for a, p in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(a, p)
    (incident,) = told(watch, "veto_unproven")
    assert "in the midst" in incident.message


def test_a_wrapper_that_nobody_named_is_told_of() -> None:
    model = net()
    inner = torch.optim.Adam(model.parameters(), lr=0.01)
    outer = PullsBack(inner)
    with Watch(model, inner, **SKIP) as watch:
        for i in range(4):
            outer.zero_grad()
            watch.after_backward(backward(model, i, bad=i == 2))
            outer.step()
            watch.after_step()
    (incident,) = told(watch, "veto_unproven")
    assert incident.severity == "critical"
    assert incident.first_step == 2
    assert "by something else" in incident.message


def test_what_takes_too_much_memory_to_copy_is_told_and_ends_the_run_where_asked_to() -> None:
    class Decays(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.01})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.mul_(0.9)

    def make(model: nn.Module) -> Any:
        return Decays(model.parameters())

    *_, watch = train(make, list(range(4)), 2, memory_limit_mb=1e-6)
    (incident,) = told(watch, "veto_unproven")
    assert "memory_limit_mb" in incident.message
    with pytest.raises(TrainingStopped, match="can't be proven"):
        train(make, list(range(4)), 2, memory_limit_mb=1e-6, stop_on_unproven=True)
    *_, watch = train(make, list(range(4)), 2, stop_on_unproven=True)
    assert told(watch, "veto_undone")


def test_stop_on_unproven_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match="`stop_on_unproven` must be True or False"):
        train(lambda m: torch.optim.SGD(m.parameters(), lr=0.1), [0], None, stop_on_unproven="yes")


def test_schedules_go_on_at_a_vetoed_step_and_are_not_put_back() -> None:
    model = net()
    optimizer = Restless(model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with Watch(model, optimizer, **SKIP) as watch:
        for i in range(5):
            optimizer.zero_grad()
            watch.after_backward(backward(model, i, bad=i in (1, 3)))
            optimizer.step()
            schedule.step()
            watch.after_step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.5**5)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, Restless])
def test_a_lowered_rate_is_lowered_for_its_steps_alone_at_vetoed_ones_too(optimizer: Any) -> None:
    model = net()
    made = Restless(model.parameters()) if optimizer is Restless else torch.optim.SGD(model.parameters(), lr=0.01)
    rules = [NonFinite(then=[SkipStep(), LowerLearningRate(0.1, steps=2)])]
    with Watch(model, made, rules=rules) as watch:
        for i in range(8):
            made.zero_grad()
            watch.step(loss=backward(model, i, bad=i in (2, 3)))
    assert made.param_groups[0]["lr"] == 0.01
    assert not told(watch, "veto_unproven")


def test_gradients_lie_there_again_as_they_were_after_a_vetoed_step() -> None:
    model = net()
    optimizer = Restless(model.parameters())
    with Watch(model, optimizer, **SKIP) as watch:
        backward(model, 0, bad=True)
        before = [p.grad for p in model.parameters()]
        assert watch.step().skip
        assert all(a is p.grad for a, p in zip(before, model.parameters(), strict=True))


def test_an_old_veto_falls_on_no_later_step() -> None:
    model = net()
    optimizer = Restless(model.parameters())
    with Watch(model, optimizer, **SKIP, every=2) as watch:
        backward(model, 0, bad=True)
        assert watch.after_backward().skip
        watch.after_step()
        optimizer.zero_grad()
        backward(model, 1)
        before = model[0].weight.detach().clone()
        watch.after_backward()
        optimizer.step()
        watch.after_step()
    assert not torch.equal(before, model[0].weight)


def test_a_vetoed_step_draws_no_random_numbers() -> None:
    model = net()
    optimizer = Restless(model.parameters())
    with Watch(model, optimizer, **SKIP) as watch:
        backward(model, 0, bad=True)
        state = torch.get_rng_state()
        watch.step()
        assert torch.equal(state, torch.get_rng_state())


def test_a_step_that_raises_is_taken_back() -> None:
    class Raises(Restless):
        def step(self, closure: Any = None) -> None:
            super().step()
            raise RuntimeError("in the midst")

    model = net()
    optimizer = Raises(model.parameters())
    with Watch(model, optimizer, **SKIP) as watch:
        backward(model, 0, bad=True)
        before = contents(model, optimizer)
        with pytest.raises(RuntimeError, match="in the midst"):
            watch.step()
        assert contents(model, optimizer) == before


def test_an_optimizer_among_several_is_vetoed_alone() -> None:
    model = net()
    first = Restless(model[0].parameters())
    second = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with Watch(model, [first, second], **SKIP) as watch:
        for i in range(4):
            before = contents(model, first)
            for optimizer, bad in ((first, i == 2), (second, False)):
                model.zero_grad()
                backward(model, i, bad=bad)
                watch.step(optimizer=optimizer)
            moved = contents(model, first) != before
            assert moved == (i != 2)
    assert not told(watch, "veto_unproven")


def test_treatments_that_never_veto_make_no_copy_and_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr("gradwatch.watch._veto.Undo", lambda *args, **options: made.append(args))
    train(lambda m: Restless(m.parameters()), list(range(4)), None, rules=[], treatments=[ClipByGlobalNorm(0.1)])
    assert not made


@pytest.mark.parametrize(
    "kind", ["tensor", "data", "swap", "group", "attribute", "list", "state", "gone", "class", "table"]
)
def test_an_undo_sees_and_puts_back_a_change_of_any_kind(kind: str) -> None:
    model = net()
    optimizer = Restless(model.parameters())
    backward(model, 0)
    optimizer.step()
    p = model[0].weight
    changes: dict[str, Callable[[], Any]] = {
        "tensor": lambda: optimizer.state[p]["sum"].view(-1)[3].add_(1e-6),
        "data": lambda: p.data.neg_(),
        "swap": lambda: setattr(p, "data", p.data.flip(0)),
        "group": lambda: optimizer.param_groups[0].update(k=9),
        "attribute": lambda: setattr(optimizer, "num_steps", 9),
        "list": lambda: optimizer.log.append(1),
        "state": lambda: optimizer.state[p].update(new=torch.zeros(2)),
        "gone": lambda: optimizer.state.pop(p),
        "class": lambda: setattr(Restless, "num_all", Restless.num_all + 1),
        "table": lambda: Restless.table.append(1),
    }
    before, place = contents(model, optimizer), p.data_ptr()
    undo, sums = Undo([optimizer], limit_bytes=2**20), Undo([optimizer], limit_bytes=0)
    assert undo.moved() == sums.moved() == []
    changes[kind]()
    assert undo.moved() == sums.moved() != []
    assert undo.put_back() == []
    assert contents(model, optimizer) == before
    assert p.data_ptr() == place
    assert sums.moved() == []


class Masked(nn.Module):
    """Half of its scores are minus infinity, by design."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mask = net(), Mask()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mask(self.body(x)).exp()


class Mask(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(torch.arange(len(x))[:, None] % 2 == 0, -math.inf)


@pytest.mark.parametrize("rules", ["autoclip", SKIP["rules"]], ids=["autoclip", "skip"])
def test_no_step_is_skipped_for_an_activation_alone(rules: Any) -> None:
    torch.manual_seed(0)
    model = Masked()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with Watch(model, optimizer, rules=rules, activations_every=1) as watch:
        for i in range(6):
            optimizer.zero_grad()
            watch.step(loss=backward(model, i, bad=i == 4))
    assert [r.step for r in watch.history if r.skipped] == [4]


def test_every_door_takes_stop_on_unproven(tmp_path: Path) -> None:
    transformers = pytest.importorskip("gradwatch.callbacks.transformers")
    fabric = pytest.importorskip("gradwatch.callbacks.fabric")
    lightning = pytest.importorskip("gradwatch.callbacks")
    for door in (transformers.GradWatchCallback, fabric.GradWatch, lightning.GradWatch):
        with pytest.raises(ConfigError, match="stop_on_unproven"):
            door(stop_on_unproven=3)
        door(stop_on_unproven=True)
