"""A veto reaches everything of its own step, and nothing of any other."""

import math
from contextlib import nullcontext

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from gradwatch import GradwatchWarning, Watch
from gradwatch.errors import TrainingStopped
from gradwatch.rules import NonFinite
from gradwatch.treatments import ClipByGlobalNorm, SkipStep
from gradwatch.watch._family import Family
from gradwatch.watch._gate import StepGate


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def groups(model: nn.Sequential) -> list[dict[str, object]]:
    return [{"params": list(layer.parameters()), "weight_decay": 0.1} for layer in model if list(layer.parameters())]


def backward(model: nn.Module, factor: float = 1.0) -> Tensor:
    loss = model(torch.ones(2, 3)).square().sum() * factor
    loss.backward()
    return loss


def everything(model: nn.Module, *optimizers: torch.optim.Optimizer) -> list[Tensor]:
    states = [v for o in optimizers for s in o.state.values() for v in s.values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in (*model.parameters(), *states)]


def same(a: list[Tensor], b: list[Tensor]) -> list[bool]:
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


class NoHooks(torch.optim.SGD):
    """An optimizer that takes no step hooks."""

    def register_step_pre_hook(self, hook):
        raise NotImplementedError("none of these")


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, NoHooks])
@pytest.mark.parametrize("several", ["groups", "optimizers"])
def test_a_vetoed_step_moves_nothing_of_any_group_of_any_optimizer(kind: type, several: str) -> None:
    model = net()
    parts = [groups(model)] if several == "groups" else [[group] for group in groups(model)]
    optimizers = [kind(part, lr=0.1) for part in parts]
    with pytest.warns(GradwatchWarning, match="takes no step hooks") if kind is NoHooks else nullcontext():
        watch = Watch(model, optimizers, treatments=[SkipStep()], rules="observe")
    with watch:
        for step in range(4):
            backward(model, math.nan if step == 2 else 1.0)
            before = everything(model, *optimizers)
            watch.step()
            if step:
                moved = [not is_same for is_same in same(before, everything(model, *optimizers))]
                assert not any(moved) if step == 2 else all(moved[:4])
            model.zero_grad()
    if kind is not NoHooks:  # nothing had to be put back: no gradient was left to any group
        assert not watch.incidents


def test_a_veto_whose_step_never_came_falls_on_no_other() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    with Watch(model, optimizer, rules=[NonFinite(then=SkipStep())], every=2) as watch:
        backward(model, math.nan)
        assert watch.after_backward().skip  # and the loop believes it: no `optimizer.step()`
        watch.after_step()
        optimizer.zero_grad()
        backward(model)
        before = everything(model)
        watch.after_backward()
        optimizer.step()
        watch.after_step()
        assert not any(same(before, everything(model)))


def test_the_update_of_an_optimizer_that_takes_no_hooks_is_measured() -> None:
    model = net()
    optimizer = NoHooks(model.parameters(), lr=0.1)
    with Watch(model, optimizer, rules="observe", updates_every=1) as watch:
        for _ in range(3):
            backward(model)
            watch.step()
            optimizer.zero_grad()
        found = [record.measured("update_ratio") for record in watch.history]
    assert all(mask[record.index.is_parameter].all() for mask, record in zip(found, watch.history, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_gate_that_is_armed_anew_forgets_what_it_was_armed_with(fused: bool) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    gate = StepGate(optimizer)
    for veto in (True, torch.tensor(True)):
        backward(model)
        before = everything(model)
        gate.arm(True)
        if isinstance(veto, Tensor):
            gate.arm_on_device(veto)
        gate.arm(False)
        optimizer.step()
        assert not any(same(before, everything(model)))
    gate.close()


@pytest.mark.parametrize("on_device", [False, True])
def test_a_veto_falls_on_one_step_alone(on_device: bool) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=on_device)
    gate = StepGate(optimizer)
    backward(model)
    optimizer.step()
    before = everything(model)
    if on_device:
        assert gate.can_arm_on_device(optimizer)
        gate.arm_on_device(torch.tensor(True))
    else:
        gate.arm(True)
    optimizer.step()
    assert all(same(before, everything(model)))
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert not any(same(before, everything(model)))
    gate.close()


class Unmeasurable(Tensor):
    """Gradients that raise where gradwatch reads them, as a device that fails would."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("the device is gone")


def play(watch: Watch, model: nn.Module, broken: list[bool]) -> int:
    """Return how many steps a loop takes of which some can't be measured."""
    for taken, is_broken in enumerate(broken, 1):
        model.zero_grad()
        backward(model)
        kept = [p.grad for p in model.parameters()]
        if is_broken:
            for p in model.parameters():
                p.grad = p.grad.as_subclass(Unmeasurable)
        assert bool(watch.after_backward().skip) == is_broken
        for p, grad in zip(model.parameters(), kept, strict=True):
            p.grad = grad
        try:
            watch.after_step()
        except TrainingStopped:
            return taken
    return len(broken)


@pytest.mark.parametrize(
    ("broken", "taken"),
    [
        pytest.param([True] * 9 + [False] + [True] * 9, 19, id="nine-in-a-row-twice"),
        pytest.param([False] + [True] * 12, 11, id="ten-in-a-row"),
    ],
)
def test_ten_steps_in_a_row_that_can_not_be_measured_end_a_training_under_treatments(
    broken: list[bool], taken: int
) -> None:
    model = net()
    watch = Watch(model, torch.optim.SGD(model.parameters(), lr=0.1), treatments=[ClipByGlobalNorm(1.0)])
    with pytest.warns(GradwatchWarning, match="the step was vetoed"):
        assert play(watch, model, broken) == taken
    watch.close()


def test_a_trainers_wrapper_moves_nothing_by_itself_and_is_no_member_of_the_family() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    _, wrapped = fabric.setup(net(), torch.optim.SGD(net().parameters(), lr=0.1))
    raw = wrapped.optimizer
    family = Family(raw, [wrapped])
    assert wrapped is not raw
    assert (family.name, family.members) == ("SGD", (raw,))
