"""Weights from quadratic programs over the cone or the hull of the task gradients: UPGrad, DualProj, MGDA, CAGrad."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError
from ._solvers import barrier_newton_cagrad, solve_lcp

__all__ = ["cagrad", "dualproj", "mgda", "upgrad"]

_RESCALE = {"none": lambda c: 1.0, "square": lambda c: 1 / (1 + c * c), "length": lambda c: 1 / (1 + c)}


def preference(value: Sequence[float] | Tensor | None, k: int, default: float) -> Tensor:
    """Return a preference vector of length k, `default` everywhere where none is given."""
    if value is None:
        return torch.full((k,), default, dtype=torch.float64)
    vector = torch.as_tensor(value, dtype=torch.float64).cpu()
    if vector.shape != (k,) or not bool((vector >= 0).all()):
        raise ConfigError(f"`pref` must hold {k} numbers >= 0, one a task. Got {vector.tolist()}.")
    return vector


def upgrad(gramian: Tensor, *, pref: Sequence[float] | None = None, reg: float = 1e-10) -> Tensor:
    """Return UPGrad's weights: each gradient is projected onto the dual cone of all, then they are averaged.

    The result conflicts with no task. `reg` is added to the diagonal of the cosines (a Gramian may be singular).

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, arXiv 2406.16232, equation 4.
    """
    k = len(gramian)
    return _onto_dual_cone(gramian, torch.diag(preference(pref, k, 1 / k)), reg).sum(0)


def dualproj(gramian: Tensor, *, pref: Sequence[float] | None = None, reg: float = 1e-10) -> Tensor:
    """Return the weights of the mean gradient projected onto the dual cone of all gradients.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory", NeurIPS 2017, arXiv 1706.08840, equation 11.
    """
    k = len(gramian)
    return _onto_dual_cone(gramian, preference(pref, k, 1 / k)[None], reg)[0]


def mgda(gramian: Tensor) -> Tensor:
    """Return the weights of the shortest vector in the convex hull of the gradients; they sum to 1.

    Near a Pareto-stationary point that vector goes to 0.

    Source: Desideri, "Multiple-gradient descent algorithm", C. R. Acad. Sci. Paris 2012; Sener and Koltun,
    "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018, arXiv 1810.04650. Solved exactly, where
    Frank-Wolfe stops a few per cent short.
    """
    k = len(gramian)
    A = gramian / gramian.diagonal().mean() + 1 + 1e-12 * torch.eye(k, dtype=gramian.dtype)
    x = solve_lcp(A, -torch.ones(1, k, dtype=gramian.dtype))[0]
    return x / x.sum()


def cagrad(gramian: Tensor, *, c: float = 0.5, rescale: str = "none") -> Tensor:
    """Return CAGrad's weights: the direction within c |g0| of the mean gradient g0 whose worst task gains most.

    `rescale` divides the result by 1 + c**2 ("square") or 1 + c ("length"), as the authors' code offers.

    Source: Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, arXiv 2110.14048,
    algorithm 1.
    """
    if not c >= 0:
        raise ConfigError(f"`c` of cagrad must be at least 0. Got {c}.")
    if rescale not in _RESCALE:
        raise ConfigError(f"`rescale` of cagrad must be one of {sorted(_RESCALE)}. Got {rescale!r}.")
    k = len(gramian)
    G = gramian / gramian.diagonal().sum()
    mean = torch.full((k,), 1 / k, dtype=G.dtype)
    phi = c * max(float(mean @ G @ mean), 0.0) ** 0.5
    w = _cagrad_pair(G, phi) if k == 2 else barrier_newton_cagrad(G, phi)
    length = max(float(w @ G @ w), 0.0) ** 0.5
    result = mean + (phi / length) * w if length > 1e-12 else mean
    return result * _RESCALE[rescale](c)


def _cagrad_pair(G: Tensor, phi: float) -> Tensor:
    """Return the minimiser (x, 1 - x) of x p + (1 - x) q + phi |x g1 + (1 - x) g2| in closed form.

    The derivative's root solves a quadratic in the slope u of the squared length.
    """
    (a, m), (_, d) = G.tolist()
    rise = (a - d) / 2
    alpha, beta = a - 2 * m + d, 2 * (m - d)
    spare = phi * phi - rise * rise / alpha if alpha > 0 else -1.0
    if spare > 0:
        delta = max(4 * alpha * d - beta * beta, 0.0)
        u = -math.copysign(math.sqrt(rise * rise * delta / (alpha * spare)), rise)
        x = min(1.0, max(0.0, (u - beta) / (2 * alpha)))
    else:
        x = 0.5 if rise == 0 else float(rise < 0)
    return torch.tensor([x, 1 - x], dtype=G.dtype)


def _onto_dual_cone(gramian: Tensor, u_BK: Tensor, reg: float) -> Tensor:
    """Return for each row u the v >= u with the least v'Gv, solved for v |g|: then the matrix holds cosines."""
    if not reg >= 0:
        raise ConfigError(f"`reg` must be at least 0. Got {reg}.")
    norms = (gramian.diagonal() / gramian.diagonal().mean()).sqrt()
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    A = gramian / gramian.diagonal().mean() / torch.outer(norms, norms)
    A = A + reg * torch.eye(len(A), dtype=A.dtype)
    bound = u_BK * norms
    return (bound + solve_lcp(A, bound @ A)) / norms
