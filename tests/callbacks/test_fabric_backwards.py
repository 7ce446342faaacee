"""Several backwards before a step of a Fabric loop: what is on record is what the optimizer gets, once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from gradwatch.callbacks.fabric import GradWatch
from gradwatch.treatments import ClipByGlobalNorm

Program = Callable[[Fabric, nn.Module, list[Tensor]], None]
EVERYTHING = {"activations_every": 1, "updates_every": 1, "histograms_every": 1, "local_norms": True}


def of_two_batches(fabric: Fabric, model: nn.Module, xs: list[Tensor]) -> None:
    for x in xs[:2]:
        fabric.backward(model(x).square().mean())


def after_both_forwards(fabric: Fabric, model: nn.Module, xs: list[Tensor]) -> None:
    one, other = model(xs[0]), model(xs[1])
    fabric.backward(one.mean())
    fabric.backward(other.mean())


def through_one_forward(fabric: Fabric, model: nn.Module, xs: list[Tensor]) -> None:
    y = model(xs[0])
    fabric.backward(y.square().mean(), retain_graph=True)
    fabric.backward(y.abs().mean())


def with_one_inside(fabric: Fabric, model: nn.Module, xs: list[Tensor]) -> None:
    x = xs[0].requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    fabric.backward((slope.norm() - 1).square() + model(xs[1]).mean())


def beside_a_forward_without(fabric: Fabric, model: nn.Module, xs: list[Tensor]) -> None:
    model(xs[1])
    fabric.backward(model(xs[0]).mean())


SAMPLES: dict[Program, int] = {of_two_batches: 6, after_both_forwards: 6, through_one_forward: 3, with_one_inside: 6}
PROGRAMS = [*SAMPLES, beside_a_forward_without]


def train(program: Program, watch: GradWatch | None) -> tuple[list[Tensor], list[float]]:
    """Return the weights after six steps, and the norm of each gradient as it lay before the step."""
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[] if watch is None else [watch])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), 0.1))
    norms = []
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        program(fabric, model, [torch.randn(3, 4, generator=generator) for _ in range(2)])
        norms.append(float(torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()))
        optimizer.step()
        optimizer.zero_grad()
    fabric.call("on_train_end")
    return [p.detach() for p in net.parameters()], norms


def watching(**options: Any) -> GradWatch:
    return GradWatch(run_dir=False, verbose=False, **options)


@pytest.mark.parametrize("options", [{}, EVERYTHING, {"autopsy": True}], ids=["default", "everything", "autopsy"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_norm_is_that_of_the_whole_and_no_bit_is_changed(program: Program, options: dict[str, Any]) -> None:
    bare, norms = train(program, None)
    watch = watching(**options)
    watched, _ = train(program, watch)
    assert all(map(torch.equal, bare, watched))
    assert [record.global_norm for record in watch.history] == pytest.approx(norms, rel=1e-5)
    if program in SAMPLES:
        assert [record.num_samples for record in watch.history] == [SAMPLES[program]] * 6


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_treatment_acts_once_on_the_whole(program: Program) -> None:
    watch = watching(treatments=[ClipByGlobalNorm(0.01)])
    train(program, watch)
    assert [len(record.treatments) for record in watch.history] == [1] * 6
    assert [record.global_norm_after for record in watch.history] == pytest.approx([0.01] * 6, rel=1e-5)


class Inherits(torch.optim.SGD):
    """Calls the step that it inherits: torch runs its hooks around both. Raises at one of them."""

    num, raises_at = 0, -1

    def step(self, closure: Any = None) -> Any:
        self.num += 1
        if self.num == self.raises_at:
            raise OverflowError("no room for the state")
        return super().step(closure)


@pytest.mark.parametrize("raises_at", [-1, 1, 3], ids=["never", "first", "third"])
@pytest.mark.parametrize("is_announced", [False, True])
def test_a_step_that_calls_the_one_it_inherits_is_one_step(is_announced: bool, raises_at: int) -> None:
    watch = GradWatch(verbose=False, treatments=[ClipByGlobalNorm(1e-3)])
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[watch])
    net = nn.Linear(4, 1)
    torch.optim.SGD(net.parameters(), 0.1)  # from here on torch's hooks are around its step, too
    raw = Inherits(net.parameters(), 0.1)
    raw.raises_at = raises_at
    model, optimizer = fabric.setup(net, raw)
    norms = []
    for step in range(5):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        fabric.backward(model(x).square().sum())
        norms.append(float(torch.stack([p.grad.norm() for p in net.parameters()]).norm()))
        if is_announced:
            fabric.call("on_before_optimizer_step", optimizer)
        before = net.weight.detach().clone()
        try:
            optimizer.step()
        except OverflowError:
            assert step + 1 == raises_at
        assert (net.weight - before).norm() <= 1.01e-4
        optimizer.zero_grad()
    fabric.call("on_train_end")
    assert [record.global_norm for record in watch.history] == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("raises_at", [-1, 3], ids=["never", "third"])  # at the first, LBFGS itself can't go on
def test_a_step_whose_closure_runs_several_times_is_one_step(raises_at: int) -> None:
    watch = GradWatch(run_dir=False, verbose=False, rules=[])
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[watch])
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    model, optimizer = fabric.setup(net, torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3))
    firsts: list[float] = []
    for step in range(1, 6):
        norms: list[float] = []

        def closure(step: int = step, norms: list[float] = norms) -> Tensor:
            if norms and step == raises_at:
                raise OverflowError("no room for the state")
            optimizer.zero_grad()
            loss: Tensor = model(torch.ones(3, 4)).square().sum()
            fabric.backward(loss)
            norms.append(float(torch.cat([p.grad.flatten() for p in net.parameters()]).norm()))
            return loss

        try:
            optimizer.step(closure)
        except OverflowError:
            assert step == raises_at
        else:
            assert len(norms) > 1
        firsts.append(norms[0])
    fabric.call("on_train_end")
    assert [record.global_norm for record in watch.history] == pytest.approx(firsts, rel=1e-6)
