"""Weights that balance the tasks: IMTL-G, Aligned-MTL, ConFIG, Nash-MTL, FairGrad."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError
from ._cone import preference
from ._solvers import fair_newton

__all__ = ["aligned_mtl", "config", "fairgrad", "imtl_g", "nash_mtl"]


def imtl_g(gramian: Tensor) -> Tensor:
    """Return weights, summing to 1, whose direction has the same projection onto every task gradient.

    They can be negative. All 0 where they would sum to 0.

    Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, closed form by the pseudo-inverse.
    """
    G = gramian / gramian.diagonal().mean()
    v = torch.linalg.pinv(G, hermitian=True) @ G.diagonal().sqrt()
    total = v.sum()
    return v / total if abs(float(total)) > 1e-12 * float(v.abs().sum()) else torch.zeros_like(v)


def aligned_mtl(gramian: Tensor, *, pref: Sequence[float] | None = None) -> Tensor:
    """Return the weights that make the gradients' principal components equally long (as the shortest one).

    Components that float32 gradients can't tell from rounding count as absent.

    Source: Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023, arXiv 2305.19000.
    """
    k = len(gramian)
    values, vectors = torch.linalg.eigh(gramian / gramian.diagonal().mean())
    # Elements are rounded at float32's epsilon, so squared lengths carry noise of its square.
    keep = values > values.max() * k * 10 * torch.finfo(torch.float32).eps ** 2
    values, vectors = values[keep], vectors[:, keep]
    balance = values.min().sqrt() * (vectors * values.rsqrt()) @ vectors.T
    return balance @ preference(pref, k, 1 / k)


def config(gramian: Tensor, *, pref: Sequence[float] | None = None) -> Tensor:
    """Return ConFIG's weights: the direction with equal cosine to all tasks, as long as the projections' sum.

    From the pseudo-inverse of the matrix of cosines, which equals the one of the unit gradients.

    Source: Liu et al., "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR 2025,
    arXiv 2408.11104.
    """
    scale = gramian.diagonal().mean()
    G = gramian / scale
    norms = G.diagonal().sqrt()
    inverse = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    cosines = inverse[:, None] * G * inverse[None]
    a = inverse * (torch.linalg.pinv(cosines, hermitian=True) @ preference(pref, len(G), 1.0))
    length = max(float(a @ G @ a), 0.0) ** 0.5
    if not length > 0:
        return torch.zeros_like(a)
    a = a / length
    return a * float((G @ a).sum())


def nash_mtl(gramian: Tensor) -> Tensor:
    """Return the weights of the Nash bargaining solution: G a = 1 / a.

    Their direction has length sqrt(k) whatever the gradients' lengths. A task without gradient takes no part and gets
    the others' mean weight.

    Source: Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, arXiv 2202.01017, claim 3.1. Solved to
    the end at every call instead of by a sequence of 20 convex programs.
    """
    return _fair(gramian, power=1.0)


def fairgrad(gramian: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return FairGrad's weights: G a = a ** (-1 / alpha). `alpha` 1 is Nash-MTL, large ones near max-min fairness.

    Source: Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, arXiv 2402.15638, equation 4.
    """
    if not alpha > 0:
        raise ConfigError(f"`alpha` of fairgrad must be above 0. Got {alpha}.")
    return _fair(gramian, power=1 / alpha)


def _fair(gramian: Tensor, *, power: float) -> Tensor:
    diagonal = gramian.diagonal()
    active = diagonal > 1e-30 * diagonal.max()
    scale = float(diagonal[active].mean())
    norms = (diagonal[active] / scale).sqrt()
    # Solved for a |g|, where the matrix is the one of cosines, so that tasks of very different lengths do no harm. The
    # ridge bounds what has no solution: gradients that cancel.
    cosines = gramian[active][:, active] / scale / torch.outer(norms, norms)
    ridge = 1e-12 * torch.eye(len(norms), dtype=norms.dtype)
    a = fair_newton(cosines + ridge, norms ** (power - 1), power=power) / norms
    result = torch.full_like(diagonal, float(a.mean()))
    result[active] = a
    return result * scale ** (-1 / (1 + power))
