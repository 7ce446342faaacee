"""What common losses, right and mistaken, make of a batch: so that a rule can tell which one the loss follows."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["formula_scalars"]

MAX_ELEMENTS = 2**20
"""Outputs larger than that (language models) are left out: what is measured must stay small beside the step."""


def formula_scalars(pred: Tensor, target: Tensor) -> dict[str, Tensor | float]:
    """Return losses of this batch by formula; a formula that does not apply is absent. Reads nothing back.

    For numbers of the predictions' size: `squared_error`, `target_variance` (mean over units of the variance over the
    batch: the squared error of the best constant), and, for one unit, `squared_error_of_pairs` (every prediction
    against every target, as broadcasting (n, 1) against (n,) gives). For classes, as indices or as rows:
    `cross_entropy` of logits, `cross_entropy_of_probabilities`, and `cross_entropy_over_batch` (softmax over dimension
    0) and `cross_entropy_twice` (softmax applied twice).
    """
    n = pred.shape[0] if pred.ndim else 0
    if n < 2 or pred.numel() > MAX_ELEMENTS or target.shape[:1] != pred.shape[:1]:
        return {}
    p = pred.double().reshape(n, -1)
    if target.is_floating_point() and target.numel() == pred.numel():
        t = target.double().reshape(n, -1)
        return _of_numbers(p, t) | (_of_classes(p, t) if pred.ndim == 2 and p.shape[1] > 1 else {})
    if not target.is_floating_point() and not target.is_complex() and pred.ndim == 2 and target.numel() == n:
        k = p.shape[1]
        # Labels such as -100 mean "ignore": their row is zero.
        rows = (target.reshape(n, 1) == torch.arange(k, device=target.device)).double()
        return _of_classes(p, rows) if k > 1 else {}
    return {}


def _of_numbers(p: Tensor, t: Tensor) -> dict[str, Tensor | float]:
    variance = t.var(dim=0, correction=0).mean()
    scalars: dict[str, Tensor | float] = {"squared_error": (p - t).square().mean(), "target_variance": variance}
    if p.shape[1] == 1:
        between = (p.mean() - t.mean()).square()
        scalars["squared_error_of_pairs"] = p.var(correction=0) + variance + between
    return scalars


def _of_classes(p: Tensor, rows: Tensor) -> dict[str, Tensor | float]:
    count = rows.sum().clamp(min=1)

    def mean(log_p: Tensor) -> Tensor:
        return -(rows * log_p).sum() / count

    return {
        "cross_entropy": mean(p.log_softmax(1)),
        "cross_entropy_of_probabilities": mean(p.clamp(min=1e-12).log()),
        "cross_entropy_over_batch": mean(p.log_softmax(0)),
        "cross_entropy_twice": mean(p.softmax(1).log_softmax(1)),
    }
