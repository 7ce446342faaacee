"""How much of the targets is left to learn: a number that no change of the loss function changes by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Pair", "unexplained"]

Pair = tuple[Tensor, Tensor]
Array = NDArray[np.float64]

MAX_ROWS, MAX_COLUMNS, MAX_CELLS = 2048, 64, 1_000_000
_SCALES = np.geomspace(1e-2, 1e3, 40)
"""Factors of the outputs, in units of one over their standard deviation, that are tried to make logits of them."""


def unexplained(pairs: Sequence[Pair]) -> float:
    """Return the share of the targets' variation that outputs leave unexplained: 0 to 1; nan where they are not finite.

    Of classes: the cross-entropy over that of a guess, with the outputs as logits of the scale that suits best, so that
    logits, probabilities and scores of any range compare. Of numbers: one minus the squared rank
    correlation, column by column; against a growing function of the target nothing is lost, nor are a few outliers
    everything. Correlations below 0 explain nothing.

    Args:
        pairs: outputs and targets of some batches.

    Raises:
        ValueError: they are not of shapes that can be compared.
    """
    found = [_matched(outputs, targets) for outputs, targets in pairs]
    if not found:
        raise ValueError("no outputs and targets")
    outputs, targets = (np.concatenate(each) for each in zip(*found, strict=True))
    if not np.isfinite(outputs).all():
        return float("nan")
    known = np.isfinite(targets).reshape(len(targets), -1).all(axis=1)
    outputs, targets = outputs[known], targets[known]
    if len(targets) < 2:
        raise ValueError("fewer than two targets")
    return _classes(outputs, targets.astype(np.int64)) if targets.ndim == 1 else _numbers(outputs, targets)


def _matched(outputs: Tensor, targets: Tensor) -> tuple[Array, Array]:
    """Return outputs of shape (N, D), and targets of shape (N,), which are classes, or (N, D), which are numbers."""
    z, y = _wide(outputs), _wide(targets)
    is_whole = not (targets.is_floating_point() or targets.dtype is torch.bool)
    if is_whole and z.ndim >= 2 and z.shape[1] > 1 and y.shape == (z.shape[0], *z.shape[2:]):
        return _rows(np.moveaxis(z, 1, -1).reshape(-1, z.shape[1]), y.reshape(-1))
    if is_whole and z.ndim >= 2 and z.shape[-1] > 1 and y.size * z.shape[-1] == z.size:
        return _rows(z.reshape(-1, z.shape[-1]), y.reshape(-1))
    if y.size != z.size or not y.size:
        raise ValueError(f"outputs of shape {z.shape} and targets of shape {y.shape}")
    z, y = (a.reshape(len(a), -1) if a.ndim else a.reshape(1, 1) for a in (z, y))
    if len(z) != len(y):
        raise ValueError(f"{len(z)} outputs and {len(y)} targets")
    if y.shape[1] > 1 and bool(((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all()):
        return _rows(z, y.argmax(1).astype(np.float64))
    step = -(-y.shape[1] // MAX_COLUMNS)
    return z[:MAX_ROWS, ::step], y[:MAX_ROWS, ::step]


def _rows(z: Array, y: Array) -> tuple[Array, Array]:
    kept = (y >= 0) & (y < z.shape[1])  # the others stand for "ignore"
    z, y = z[kept], y[kept]
    most = max(2, min(MAX_ROWS, MAX_CELLS // z.shape[1]))
    step = max(1, -(-len(y) // most))
    return z[::step], y[::step]


def _wide(tensor: Tensor) -> Array:
    found: Array = tensor.detach().to("cpu", torch.float64).numpy()
    return found


def _classes(z: Array, y: NDArray[np.int64]) -> float:
    if len(np.unique(y)) < 2:
        raise ValueError("all targets are one class")
    spread = z.std(axis=1).mean()
    if not spread > 0:
        return 1.0
    unit = (z - z.mean(axis=1, keepdims=True)) / spread
    chance = float(np.log(z.shape[1]))
    return min(chance, *(_cross_entropy(unit * scale, y) for scale in _SCALES)) / chance


def _cross_entropy(z: Array, y: NDArray[np.int64]) -> float:
    z = z - z.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(y)), y]))


def _numbers(z: Array, y: Array) -> float:
    found = []
    for column in range(y.shape[1]):
        a, b = _ranks(z[:, column]), _ranks(y[:, column])
        if b.std() > 0:
            spread = a.std() * b.std()
            correlation = float(np.mean((a - a.mean()) * (b - b.mean())) / spread) if spread > 0 else 0.0
            found.append(1.0 - max(correlation, 0.0) ** 2)
    if not found:
        raise ValueError("all targets are equal")
    return float(np.mean(found))


def _ranks(values: Array) -> Array:
    """Return ranks, the mean rank for those that are equal."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[place]
