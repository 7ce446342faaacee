"""Weights by projecting conflicts away, in the order tasks are drawn: PCGrad and Gradient Vaccine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError

__all__ = ["GradVac", "pcgrad"]


def _orders(k: int, step: int) -> list[list[int]]:
    """Return for each task the order in which it meets the others: the same for a step on every rank."""
    if k < 3:
        return [[j for j in range(k) if j != i] for i in range(k)]
    generator = torch.Generator().manual_seed(0x5EED + int(step))
    return [[j for j in torch.randperm(k, generator=generator).tolist() if j != i] for i in range(k)]


def pcgrad(gramian: Tensor, *, step: int = 0) -> Tensor:
    """Return PCGrad's weights: each gradient loses its component against every other that it conflicts with.

    The order in which a task meets the others is random, from a generator seeded by `step`: the global generator would
    give each rank its own weights. Without a conflict the weights are exactly 1.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, arXiv 2001.06782, algorithm 1.
    """
    G = gramian.tolist()
    k = len(G)
    total = [0.0] * k
    for i, others in enumerate(_orders(k, step)):
        mix = [0.0] * k
        mix[i] = 1.0
        for j in others:
            dot = sum(product * share for product, share in zip(G[j], mix, strict=True))
            if dot < 0 and G[j][j] > 0:
                mix[j] -= dot / G[j][j]
        total = [t + share for t, share in zip(total, mix, strict=True)]
    return torch.tensor(total, dtype=gramian.dtype)


class GradVac:
    """Gradient Vaccine: like PCGrad, but towards a running mean of each pair's cosine instead of 0.

    The target of a pair starts at 0, so that the first call is PCGrad's, and follows the cosines seen
    (`target += beta (cosine - target)`). A non-finite Gramian must not be given: it would stay in the memory.

    Source: Wang et al., "Gradient Vaccine", ICLR 2021, arXiv 2010.05874, equations 2 and 3. Targets are kept between
    whole gradients, not per layer.

    Attributes:
        beta: weight of the newest cosine, in [0, 1].
        targets: (k, k) float64, or None before the first call.
    """

    def __init__(self, *, beta: float = 0.01) -> None:
        if not 0 <= beta <= 1:
            raise ConfigError(f"`beta` of gradvac must be in [0, 1]. Got {beta}.")
        self.beta = beta
        self.targets: Tensor | None = None

    def __call__(self, gramian: Tensor, *, step: int = 0) -> Tensor:
        """Return the weights for this Gramian, and move the targets."""
        k = len(gramian)
        if self.targets is None or len(self.targets) != k:
            self.targets = torch.zeros(k, k, dtype=torch.float64)
        total = torch.zeros(k, dtype=gramian.dtype)
        for i, others in enumerate(_orders(k, step)):
            mix = torch.zeros(k, dtype=gramian.dtype)
            mix[i] = 1
            for j in others:
                self._meet(gramian, mix, i, j)
            total += mix
        return total

    def _meet(self, gramian: Tensor, mix: Tensor, i: int, j: int) -> None:
        assert self.targets is not None
        own = max(float(mix @ gramian @ mix), 0.0) ** 0.5
        other = max(float(gramian[j, j]), 0.0) ** 0.5
        if not own * other > 0:
            return
        cosine = max(-1.0, min(1.0, float(gramian[j] @ mix) / (own * other)))
        target = float(self.targets[i, j])
        if cosine < target:
            sine, target_sine = (1 - cosine**2) ** 0.5, (1 - target**2) ** 0.5
            if target_sine > 0:
                mix[j] += own * (target * sine - cosine * target_sine) / (other * target_sine)
        self.targets[i, j] = target + self.beta * (cosine - target)

    def state_dict(self) -> dict[str, Any]:
        return {"targets": self.targets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        targets = state.get("targets")
        self.targets = None if targets is None else torch.as_tensor(targets, dtype=torch.float64)
