"""A step that nobody says is over does not swallow the next one: what comes after it is measured, and treated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.treatments import ClipByGlobalNorm

MAX_NORM = 0.01
BROKEN = 2


class Raises(torch.optim.LBFGS):
    """One of whose steps raises in its midst, after the closure."""

    num = 0

    def step(self, closure: Any = None) -> Any:
        self.num += 1
        if self.num == BROKEN + 1:
            if closure is not None:
                closure()
            raise OverflowError("no room for the state")
        return super().step(closure or (lambda: torch.zeros(())))


class Loop:
    """A loop that notes the norm of what its optimizer would get."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 2)
        self.x = torch.randn(8, 4)
        self.optimizer = Raises(self.model.parameters(), lr=1e-3, max_iter=3)
        self.watch = Watch(self.model, self.optimizer, rules=[], treatments=[ClipByGlobalNorm(MAX_NORM)])
        self.norms: list[float] = []

    def backward(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.model(self.x).square().mean()
        loss.backward()
        return loss

    def note(self) -> None:
        self.norms.append(float(torch.cat([p.grad.flatten() for p in self.model.parameters()]).norm()))

    def measured(self) -> torch.Tensor:
        """A closure that announces its step by itself; what it is called again for is not treated again."""
        loss = self.backward()
        num = len(self.watch.history)
        self.watch.after_backward(loss)
        if len(self.watch.history) > num:
            self.note()
        return loss


def raises_in_its_step(loop: Loop, step: int) -> None:
    loop.watch.step(loop.backward())
    loop.note()


def goes_on_between_the_halves(loop: Loop, step: int) -> None:
    loop.watch.after_backward(loop.backward())
    loop.note()
    if step != BROKEN:
        loop.watch.after_step()


@pytest.mark.parametrize("once", [raises_in_its_step, goes_on_between_the_halves])
def test_the_step_after_one_that_was_left_open_is_treated(once: Callable[[Loop, int], None]) -> None:
    loop = Loop()
    with loop.watch:
        for step in range(6):
            try:
                once(loop, step)
            except OverflowError:
                assert step == BROKEN
    assert len(loop.norms) >= 5
    assert loop.norms == pytest.approx([MAX_NORM] * len(loop.norms), rel=1e-4)
    assert [r.global_norm_after for r in loop.watch.history] == pytest.approx([MAX_NORM] * 6, rel=1e-4)


def test_a_closure_after_one_that_raised_is_measured() -> None:
    loop = Loop()
    with loop.watch:
        for step in range(5):
            try:
                loop.watch.step(loop.backward)
            except OverflowError:
                assert step == BROKEN
    assert [r.step for r in loop.watch.history] == list(range(5))


def test_a_closure_that_announces_its_step_is_called_again_within_it() -> None:
    loop = Loop()
    loop.optimizer.num = BROKEN + 1  # never raises
    with loop.watch:
        for _ in range(4):
            loop.optimizer.step(loop.measured)
            loop.watch.after_step()
    assert [r.step for r in loop.watch.history] == list(range(4))
    assert loop.watch.num_steps == 4


class Outer:
    """A wrapper that no hook hears: two passes around the step of the optimizer inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups = optimizer, optimizer.param_groups

    def step(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:
        closure()
        loss = closure()
        self.inner.step()
        return loss


def test_a_wrapper_that_calls_its_closure_twice_takes_one_step() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2), torch.randn(8, 4)
    outer = Outer(torch.optim.SGD(model.parameters(), lr=0.1))
    with Watch(model, outer.inner, rules=[]) as watch:

        def closure() -> torch.Tensor:
            outer.inner.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            watch.after_backward(loss)
            return loss

        for _ in range(4):
            outer.step(closure)
            watch.after_step()
    assert [r.step for r in watch.history] == list(range(4))
