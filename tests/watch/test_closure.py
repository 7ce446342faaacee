"""`watch.step(closure)`: forward and backward run inside the optimizer's step; judged once, and a veto holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwatch import ConfigError, Watch
from gradwatch.rules import NonFinite
from gradwatch.treatments import ClipByGlobalNorm, SkipStep


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def batches(num: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 8, generator=generator) for _ in range(num)]


def searched(params: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(params, lr=0.5, max_iter=5, line_search_fn="strong_wolfe")


def unsearched(params: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(params, lr=0.1, max_iter=4)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def closure_of(model: nn.Module, optimizer: Any, x: Tensor, *, spoiled: bool = False) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(x) - x[:, :1]).square().mean()
        loss = loss * math.nan if spoiled else loss
        loss.backward()
        return loss

    return closure


def norm_of(model: nn.Module) -> float:
    return float(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).norm())


OPTIMIZERS = [searched, unsearched, sgd]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda f: f.__name__)
def test_a_step_with_a_closure_is_the_optimizers_own(make: Any) -> None:
    def train(is_watched: bool) -> tuple[list[Tensor], list[float]]:
        model = net()
        optimizer = make(model.parameters())
        losses = []
        if not is_watched:
            losses = [optimizer.step(closure_of(model, optimizer, x)).item() for x in batches()]
            return list(model.parameters()), losses
        with Watch(model, optimizer, rules="observe", activations_every=1, updates_every=1, on_error="raise") as watch:
            for x in batches():
                losses.append(watch.step(closure_of(model, optimizer, x)).item())
        assert [r.step for r in watch.history] == list(range(6))
        assert [r.loss for r in watch.history] == pytest.approx(losses, rel=1e-6)
        return list(model.parameters()), losses

    (bare, plain), (watched, seen) = train(False), train(True)
    assert plain == seen
    assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda f: f.__name__)
def test_a_record_holds_the_first_evaluation(make: Any) -> None:
    model = net()
    optimizer = make(model.parameters())
    true = []
    with Watch(model, optimizer, rules="observe", on_error="raise") as watch:
        for x in batches():
            closure_of(model, optimizer, x)()
            true.append(norm_of(model))
            watch.step(closure_of(model, optimizer, x))
    assert [r.global_norm for r in watch.history] == pytest.approx(true, rel=1e-5)
    assert [r.global_norm_applied for r in watch.history] == pytest.approx(true, rel=1e-5)
    assert all("update_ratio" in r.columns for r in watch.history[:1])


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda f: f.__name__)
def test_a_veto_of_a_step_with_a_closure_moves_nothing(make: Any) -> None:
    model = net()
    optimizer = make(model.parameters())
    with Watch(model, optimizer, rules=[NonFinite(then=SkipStep())], on_error="raise") as watch:
        for step, x in enumerate(batches()):
            before = [p.detach().clone() for p in model.parameters()]
            watch.step(closure_of(model, optimizer, x, spoiled=step == 3))
            moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert moved == (step != 3)
            assert watch.outcome.skip == (step == 3)
    assert [r.skipped for r in watch.history] == [step == 3 for step in range(6)]
    assert watch.history[3].global_norm_applied is None


def test_treatments_of_a_step_with_a_closure_act_on_what_the_optimizer_gets() -> None:
    model = net()
    optimizer = sgd(model.parameters())
    with Watch(model, optimizer, rules="observe", treatments=ClipByGlobalNorm(0.01), on_error="raise") as watch:
        for x in batches():
            watch.step(closure_of(model, optimizer, x))
    assert [r.global_norm_after for r in watch.history] == pytest.approx([0.01] * 6, rel=1e-4)
    assert [r.global_norm_applied for r in watch.history] == pytest.approx([0.01] * 6, rel=1e-4)


def test_a_closure_under_a_scaler_is_an_error_that_says_why() -> None:
    model = net()
    optimizer = sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    with (
        Watch(model, optimizer, scaler=scaler) as watch,
        pytest.raises(ConfigError, match="takes no closure: gradients must be unscaled"),
    ):
        watch.step(closure_of(model, optimizer, batches()[0]))


def test_a_closure_for_several_optimizers_asks_for_one() -> None:
    model = net()
    first, second = sgd(model[0].parameters()), sgd(model[2].parameters())  # type: ignore[index]
    with Watch(model, [first, second], on_error="raise") as watch:
        closure = closure_of(model, first, batches()[0])
        with pytest.raises(ConfigError, match="belongs to one optimizer"):
            watch.step(closure)
        assert isinstance(watch.step(closure, optimizer=first), Tensor)


def test_an_exception_in_a_closure_is_the_users_and_leaves_the_next_step_whole() -> None:
    model = net()
    optimizer = searched(model.parameters())

    def bad() -> Tensor:
        raise ZeroDivisionError

    with Watch(model, optimizer, rules="observe", on_error="raise") as watch:
        with pytest.raises(ZeroDivisionError):
            watch.step(bad)
        watch.step(closure_of(model, optimizer, batches()[0]))
    assert len(watch.history) == 1
