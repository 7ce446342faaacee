"""Three solvers for k x k problems, k tasks: float64 on the CPU, no dependency beyond torch.

They see Gramians already divided by their trace or mean diagonal, so tolerances are relative.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["barrier_newton_cagrad", "fair_newton", "solve_lcp"]


def solve_lcp(A: Tensor, q_BK: Tensor, *, max_iterations: int = 200) -> Tensor:
    """Return x >= 0 with A x + q >= 0 and x . (A x + q) = 0, for every row q: the minimiser of x'Ax/2 + q'x.

    Block principal pivoting: all violated indices change sides at once; after three rounds without progress a row falls
    back to one index at a time, which ends (Murty's rule).

    Args:
        A: (k, k), symmetric positive definite.
        q_BK: (B, k), one problem a row.

    Returns:
        (B, k).

    Source: Judice and Pires, "A block principal pivoting algorithm for large-scale strictly monotone linear
    complementarity problems", Computers & Operations Research 1994.
    """
    rows, k = q_BK.shape
    tolerance = 1e-12 * A.diagonal().abs().max()
    free = q_BK < 0
    fewest = [k + 1] * rows
    patience = [3] * rows
    eye = torch.eye(k, dtype=A.dtype)
    x = torch.zeros_like(q_BK)
    for _ in range(max_iterations):
        both = free[:, :, None] & free[:, None, :]
        system = torch.where(both, A, eye * (~free)[:, :, None])
        x = torch.linalg.solve(system, (-q_BK * free)[..., None])[..., 0]
        slack = x @ A + q_BK
        wrong = (free & (x < -tolerance)) | (~free & (slack < -tolerance))
        counts = wrong.sum(1).tolist()
        if not any(counts):
            break
        for row, count in enumerate(counts):
            if count == 0:
                continue
            if count < fewest[row]:
                fewest[row], patience[row] = count, 3
            elif patience[row] > 0:
                patience[row] -= 1
            else:
                last = int(wrong[row].nonzero().max())
                free[row, last] = ~free[row, last]
                continue
            free[row] ^= wrong[row]
    return x.clamp(min=0)


def fair_newton(
    A: Tensor, right: Tensor, *, power: float, max_iterations: int = 200, tolerance: float = 1e-14
) -> Tensor:
    """Return the a > 0 with A a = right * a**(-power): the minimiser of a'Aa/2 plus a barrier, by damped Newton.

    `power` 1 is Nash-MTL's condition, 1/alpha FairGrad's.
    """
    k = len(A)
    a = (right / (A.diagonal() * k)) ** (1 / (1 + power))
    for _ in range(max_iterations):
        residual = A @ a - right * a.pow(-power)
        size = float(residual.norm())
        if size < tolerance * float((right * a.pow(-power)).norm()):
            break
        hessian = A + torch.diag(power * right * a.pow(-power - 1))
        direction = -torch.linalg.solve(hessian, residual)
        step = _step_that_stays_positive(a, direction)
        while step > 1e-12:
            trial = a + step * direction
            if float((A @ trial - right * trial.pow(-power)).norm()) < size * (1 - 1e-4 * step):
                break
            step /= 2
        else:
            break
        a = a + step * direction
    return a


def barrier_newton_cagrad(G: Tensor, phi: float, *, end: float = 1e-12) -> Tensor:
    """Return the w on the simplex that minimises w'G1/k + phi sqrt(w'Gw), by Newton with a log barrier."""
    k = len(G)
    mean = torch.full((k,), 1 / k, dtype=G.dtype)
    linear = G @ mean
    w = mean.clone()
    barrier = 0.1
    kkt = torch.zeros(k + 1, k + 1, dtype=G.dtype)
    kkt[k, :k] = kkt[:k, k] = 1
    right = torch.zeros(k + 1, dtype=G.dtype)
    for _ in range(120):
        Gw = G @ w
        square = float(w @ Gw) + 1e-18
        length = square**0.5
        gradient = linear + (phi / length) * Gw - barrier / w
        curvature = G - torch.outer(Gw, Gw) / square
        kkt[:k, :k] = (phi / length) * curvature + torch.diag(barrier / (w * w))
        right[:k] = -gradient
        direction = torch.linalg.solve(kkt, right)[:k]
        step = _step_that_stays_positive(w, direction)
        w = w + step * direction
        if step > 0.5:
            barrier *= 0.15
        if barrier < end:
            break
    w = w.clamp(min=0)
    return w / w.sum()


def _step_that_stays_positive(x: Tensor, direction: Tensor) -> float:
    shrinking = direction < 0
    if not bool(shrinking.any()):
        return 1.0
    return min(1.0, 0.95 * float((-x[shrinking] / direction[shrinking]).min()))
