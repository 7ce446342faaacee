"""A small training in which one bit may be flipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def flip(tensor: Tensor, element: int, bit: int) -> None:
    """Flip one bit of one float32 number where it lies, as a memory fault does: no version counter sees it."""
    words = tensor.detach().view(-1).numpy().view("int32")
    words[element] ^= -(2**31) if bit == 31 else 1 << bit


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.ReLU(), nn.Linear(12, 3))


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(step)
    return torch.randn(size, 6, generator=made), torch.randint(0, 3, (size,), generator=made)


class Faulty(torch.autograd.Function):
    """Multiplies matrices as `linear` does; once a bit of the result of its backward is flipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bit: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bit = bit
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        of_weight = grad.mT @ x
        if ctx.bit:
            flip(of_weight, 5, ctx.bit.pop())
        return grad @ weight, of_weight, None


class Weak(nn.Module):
    """A linear layer on a processor that fails once when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 6) / 3)
        self.bits: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return Faulty.apply(x, self.weight, self.bits)


def weak_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Weak(), nn.Tanh(), nn.Linear(12, 3))


def train(
    watch: Any, model: nn.Module, steps: int, *, parts: int = 1, before: Callable[[int], object] = lambda step: None
) -> None:
    for step in range(steps):
        before(step)
        x, y = batch(step)
        for inputs, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = F.cross_entropy(model(inputs), targets) / parts
            loss.backward()
        watch.step(loss)
        watch.optimizers[0].zero_grad()


@contextmanager
def flipped_before_step(optimizer: torch.optim.Optimizer, change: Callable[[], object]) -> Iterator[None]:
    """Change something between the look at the gradients and the optimizer's step."""
    handle = optimizer.register_step_pre_hook(lambda *_: change())
    try:
        yield
    finally:
        handle.remove()
