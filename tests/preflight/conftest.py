"""Small sound problems, and ways to spoil them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """Thirty-two inputs of 8 numbers in four classes that a small net can tell apart."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(32) % 4
    centres = torch.randn(4, 8, generator=generator)
    return centres[y] + 0.3 * torch.randn(32, 8, generator=generator), y


@pytest.fixture
def numbers() -> tuple[Tensor, Tensor]:
    """Thirty-two inputs of 8 numbers, and a number to predict, of shape (32, 1)."""
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    return x, x[:, :1] - 2 * x[:, 1:2]


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture
def regressor() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
