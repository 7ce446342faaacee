"""A parameter that is not what it looks like is read where its gradient lies, or said not to be seen: never taken for
a plain one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwatch import Watch
from gradwatch.errors import GradwatchWarning
from gradwatch.treatments import ClipByGlobalNorm, SkipStep
from gradwatch.watch._deepspeed import BeforeStep


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def loss_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    return (model(x) - 3).square().mean()


def norms_of(model: nn.Module) -> dict[str, float]:
    return {name: float(p.grad.double().norm()) for name, p in model.named_parameters() if p.grad is not None}


def of_deepspeed(model: nn.Module) -> None:
    for i, p in enumerate(model.parameters()):
        p.ds_id = i


def of_an_unknown_flat_parameter(model: nn.Module) -> None:
    """As FSDP marks them, where the wrapper lies further out than the model that gradwatch is given."""
    for p in model.parameters():
        p._fsdp_flattened = True


class Rows(Tensor):
    """Somebody's own tensor of which every rank holds some rows."""

    def local_shards(self) -> Tensor:
        return self.as_subclass(Tensor)


def of_an_unknown_class(model: nn.Module) -> None:
    for module in model:
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach().as_subclass(Rows)))


@pytest.mark.parametrize("mark", [of_deepspeed, of_an_unknown_flat_parameter, of_an_unknown_class])
def test_a_piece_of_something_unknown_is_not_seen_and_neither_judged_nor_treated(mark: Any) -> None:
    model, twin = net(), net()
    mark(model)
    optimizer, other = (torch.optim.SGD(m.parameters(), 0.01) for m in (model, twin))
    with pytest.warns(GradwatchWarning, match="no treatment will act: 4 parameters can't be seen, '0.weight'"):
        watch = Watch(model, optimizer, rules="autoclip", treatments=ClipByGlobalNorm(1e-3), updates_every=1)
    for step in range(40):
        scale = 100.0 if step == 30 else 1.0
        for m, stepper in ((model, other), (twin, other)):
            (loss_of(m) * scale).backward()
            if m is model:
                watch.step(loss=1.0)
            else:
                stepper.step()
            m.zero_grad()
    watch.close()
    assert not watch.incidents, watch.incidents
    paths = [name for name, _ in model.named_parameters()]
    for record in watch.history:
        assert math.isnan(record.global_norm)
        assert not record.has_gradient
        assert set(record.unseen) == {"", *paths}
    assert {watch.session.coverage()[path].state for path in paths} == {"unseen"}
    assert "treatments do not act" in watch.summary()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.detach().as_subclass(Tensor), q)


def add_to_main(p: Tensor) -> None:
    p.main_grad.add_(p.grad)
    p.grad = None


class FromMainGrad(torch.optim.SGD):
    """Takes gradients from where fused layers have added them up."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.main_grad, alpha=group["lr"])
                    p.main_grad.zero_()


def test_main_grad_is_measured_and_treated_where_it_exists() -> None:
    model, twin = net(), net()
    for p in model.parameters():
        p.main_grad = torch.zeros_like(p)
        p.register_post_accumulate_grad_hook(add_to_main)
    optimizer, other = FromMainGrad(model.parameters(), 0.1), torch.optim.SGD(twin.parameters(), 0.1)
    with Watch(model, optimizer, rules="default", treatments=ClipByGlobalNorm(0.5), on_error="raise") as watch:
        for _ in range(5):
            loss_of(twin).backward()
            wanted = norms_of(twin)
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            other.step()
            other.zero_grad()
            loss = loss_of(model)
            loss.backward()
            record = watch.step(loss=loss).record
            assert {path: record["grad_norm", path] for path in wanted} == pytest.approx(wanted, rel=1e-5)
            assert record.global_norm_after == pytest.approx(min(0.5, record.global_norm), rel=1e-5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert not watch.incidents


class CopiesInside(torch.optim.SGD):
    """Holds float32 copies of a half-precision model's parameters, and copies there and back in its own step."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.models = list(model.parameters())
        super().__init__([nn.Parameter(p.detach().float()) for p in self.models], lr)

    def fetch(self) -> None:
        for p, q in zip(self.models, self.param_groups[0]["params"], strict=True):
            q.grad = None if p.grad is None else p.grad.float()

    def step(self, closure: Any = None) -> None:
        self.fetch()
        super().step()
        self.put()

    def put(self) -> None:
        with torch.no_grad():
            for p, q in zip(self.models, self.param_groups[0]["params"], strict=True):
                p.copy_(q)
                p.grad = q.grad = None


class CopiesOutside(CopiesInside):
    """The program copies gradients before the step, and weights after it."""

    def step(self, closure: Any = None) -> None:
        torch.optim.SGD.step(self)


@pytest.mark.parametrize("kind", [CopiesInside, CopiesOutside])
def test_copies_in_float32_bear_the_names_of_the_models_parameters(kind: type[CopiesInside]) -> None:
    model, twin = net().bfloat16(), net().bfloat16()
    optimizer, other = kind(model, 0.1), CopiesInside(twin, 0.1)
    with Watch(
        model, optimizer, rules="default", treatments=ClipByGlobalNorm(0.5), updates_every=1, on_error="raise"
    ) as watch:
        for _ in range(5):
            loss_of(twin, torch.bfloat16).backward()
            wanted = norms_of(twin)
            whole = math.hypot(*wanted.values())
            for p in twin.parameters():
                p.grad.mul_(min(1.0, 0.5 / whole))
            other.step()
            loss = loss_of(model, torch.bfloat16)
            loss.backward()
            if kind is CopiesOutside:
                optimizer.fetch()
            record = watch.step(loss=loss).record
            if kind is CopiesOutside:
                optimizer.put()
            assert {path: record["grad_norm", path] for path in wanted} == pytest.approx(wanted, rel=1e-2)
            assert record.global_norm_after == pytest.approx(min(0.5, record.global_norm), rel=1e-5)
            assert set(record.index.paths[:4]) == set(wanted)
            assert not record.unseen
    assert not watch.incidents
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-2)


def test_a_step_of_copies_that_is_skipped_moves_neither_them_nor_the_model() -> None:
    model = net().bfloat16()
    optimizer = CopiesInside(model, 0.1)
    with Watch(model, optimizer, treatments=SkipStep(max_consecutive=10)) as watch:
        before = [p.detach().clone() for p in (*model.parameters(), *optimizer.param_groups[0]["params"])]
        (loss_of(model, torch.bfloat16) * math.nan).backward()
        outcome = watch.step(loss=1.0)
        assert outcome.skip
        after = [*model.parameters(), *optimizer.param_groups[0]["params"]]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_losses_that_an_engine_scales_are_heard_unscaled_until_its_step() -> None:
    class Zero:
        steps = 0

        def step(self) -> None:
            self.steps += 1

    class Engine:
        optimizer = Zero()

        def backward(self, loss: Tensor) -> Tensor:
            return loss * 8

    heard: list[list[float]] = []
    engine = Engine()
    before = BeforeStep(engine, lambda: heard.append([float(x) for x in before.losses]))
    for losses in ([1.0, 2.0], [3.0]):
        for value in losses:
            assert float(engine.backward(torch.tensor(value))) == 8 * value
        engine.optimizer.step()
    before.close()
    assert heard == [[1.0, 2.0], [3.0]]
    engine.optimizer.step()
    assert (engine.optimizer.steps, len(heard), vars(engine)) == (3, 2, {})
