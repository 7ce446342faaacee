"""Losses and validation metrics of the programs.

`keras_*` take probabilities, as Keras 2 does: clipped to [1e-7, 1 - 1e-7], rows divided by their sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "Loss",
    "Metric",
    "accuracy",
    "accuracy_above_half",
    "cross_entropy",
    "explained",
    "keras_binary_crossentropy",
    "keras_crossentropy",
    "mean_absolute",
    "mean_square",
    "negated",
    "sum_square",
    "weight_penalty",
]

Loss = Callable[[Tensor, Tensor], Tensor]
Metric = Callable[[Tensor, Tensor], float]

_EPS = 1e-7


def keras_crossentropy(p: Tensor, y: Tensor) -> Tensor:
    p = (p / (p.sum(-1, keepdim=True) + 1e-12)).clamp(_EPS, 1 - _EPS)
    return -(y * p.log()).sum(-1).mean()


def keras_binary_crossentropy(p: Tensor, y: Tensor) -> Tensor:
    p = p.clamp(_EPS, 1 - _EPS)
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Of logits and one-hot rows."""
    return -(y * functional.log_softmax(logits, -1)).sum(-1).mean()


def mean_square(p: Tensor, y: Tensor) -> Tensor:
    return ((p - y) ** 2).mean()


def sum_square(p: Tensor, y: Tensor) -> Tensor:
    return ((p - y) ** 2).sum()


def mean_absolute(p: Tensor, y: Tensor) -> Tensor:
    return (p - y).abs().mean()


def negated(loss: Loss) -> Loss:
    """Return the loss with its sign flipped: training that climbs."""
    return lambda p, y: -loss(p, y)


def weight_penalty(loss: Loss, model: nn.Sequential, strength: float) -> Loss:
    """Return the loss plus `strength` times the sum of squares of the layers' weights (biases are free)."""
    weights = [layer.weight for layer in model if hasattr(layer, "weight")]
    return lambda p, y: loss(p, y) + strength * sum((w**2).sum() for w in weights)


def accuracy(p: Tensor, y: Tensor) -> float:
    """Share of rows whose largest output stands where the one-hot row has its 1."""
    return (p.argmax(-1) == y.argmax(-1)).float().mean().item()


def accuracy_above_half(p: Tensor, y: Tensor) -> float:
    """Share of outputs on the right side of one half."""
    return ((p > 0.5).float() == y).float().mean().item()


def explained(p: Tensor, y: Tensor) -> float:
    """Coefficient of determination, not below -1; -1 for outputs that are not finite."""
    value = 1 - ((p - y) ** 2).mean() / ((y - y.mean()) ** 2).mean()
    return max(-1.0, value.item()) if torch.isfinite(value) else -1.0
