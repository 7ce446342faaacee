"""A small two-headed regression whose tasks conflict at about half of the steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


class TwoHeads(nn.Module):
    """A trunk with two heads; `losses` of the tasks "a" and "b"."""

    def __init__(self) -> None:
        super().__init__()
        generator_state = torch.get_rng_state()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh())
        self.a = nn.Linear(16, 1)
        self.b = nn.Linear(16, 1)
        self.b.load_state_dict(self.a.state_dict())
        torch.set_rng_state(generator_state)

    def losses(self, x: Tensor, ya: Tensor, yb: Tensor) -> tuple[Tensor, Tensor]:
        shared = self.trunk(x)
        return (self.a(shared).squeeze(1) - ya).pow(2).mean(), 5 * (self.b(shared).squeeze(1) - yb).pow(2).mean()


def batches(number: int = 8, size: int = 32) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(number):
        x = torch.randn(size, 8, generator=generator)
        y = torch.sin(x.sum(1))
        result.append((x, y, -y + 0.3 * x[:, 0]))
    return result


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def task_gramian(losses: tuple[Tensor, ...], parameters: list[nn.Parameter]) -> Tensor:
    """The reference: flat float64 gradients, one matrix product."""
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
    return J @ J.T


@pytest.fixture
def two_heads() -> Callable[[], TwoHeads]:
    return TwoHeads
