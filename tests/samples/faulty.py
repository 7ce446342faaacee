"""A training in which one sample of one batch is wrong."""

from __future__ import annotations

import torch
from torch import nn

from gradwatch.rules import Exploding, LossSpike, NonFinite

__all__ = ["RULES", "SIZE", "WHEN", "WHO", "data", "network"]

RULES = [Exploding(min_samples=16, z=6, ratio=5), LossSpike(min_samples=16, spikes=1), NonFinite()]
WHEN, WHO, SIZE = 30, 5, 16


def data(steps: int, fault: str):
    """Yield batches of a linear problem, of which one has a sample that is wrong."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(8, 1, generator=generator)
    for step in range(steps):
        x = torch.randn(SIZE, 8, generator=generator)
        y = x @ weights
        if step == WHEN:
            if fault == "target":
                y[WHO] += 1000
            else:
                x[WHO, 0] = torch.nan
        yield x, y


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))
