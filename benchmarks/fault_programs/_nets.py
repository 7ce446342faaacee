"""Networks of the programs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Detach", "Exp", "conv_net", "initialise_", "mlp", "zero_linear"]


class Exp(nn.Module):
    """The exponential as an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x)


class Detach(nn.Module):
    """Cuts the graph: a `.detach()` left in a forward."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


ACTIVATIONS = {
    "elu": nn.ELU,
    "exp": Exp,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "softmax": lambda: nn.Softmax(-1),
    "tanh": nn.Tanh,
}
"""By name; `"linear"` puts no module in."""


@torch.no_grad()
def initialise_(layer: nn.Module, kind: str, *, std: float = 0.05, value: float = 0.01, bias: float = 0.0) -> None:
    """Fill weight and bias of a linear or convolutional layer in one of the programs' ways.

    Args:
        layer: with `weight` (fan_out, fan_in, ...) and `bias`.
        kind: `he_uniform`, `he_normal`, `glorot`, `uniform` (±.05), `normal` (of `std`), `constant` (all `value`), or
            `standard_normal` (weights and biases from N(0, 1)).
        std, value, bias: see `kind`; biases are `bias`, save under `standard_normal`.
    """
    weight = layer.weight
    field = weight[0, 0].numel()
    fan_in, fan_out = weight[0].numel(), weight.shape[0] * field
    layer.bias.normal_(0, 1) if kind == "standard_normal" else layer.bias.fill_(bias)
    if kind in ("he_uniform", "glorot", "uniform"):
        bound = {
            "he_uniform": math.sqrt(6 / fan_in),
            "glorot": math.sqrt(6 / (fan_in + fan_out)),
            "uniform": 0.05,
        }[kind]
        weight.uniform_(-bound, bound)
    elif kind == "constant":
        weight.fill_(value)
    else:
        weight.normal_(0, {"he_normal": math.sqrt(2 / fan_in), "normal": std, "standard_normal": 1.0}[kind])


def mlp(
    sizes: Sequence[int],
    activations: Sequence[str],
    init: str | Sequence[str],
    *,
    dropout: float = 0.0,
    std: float = 0.05,
    value: float = 0.01,
) -> nn.Sequential:
    """Return linear layers with an activation behind each (`"linear"`: none) and dropout between them.

    Args:
        sizes: features of the input and of every layer.
        activations: one per layer.
        init: of every layer, or one per layer (see `initialise_`).
        dropout: behind every layer but the last.
        std, value: of the initialisation.
    """
    inits = [init] * len(activations) if isinstance(init, str) else list(init)
    layers: list[nn.Module] = []
    for i, activation in enumerate(activations):
        layers.append(nn.Linear(sizes[i], sizes[i + 1]))
        initialise_(layers[-1], inits[i], std=std, value=value)
        if activation != "linear":
            layers.append(ACTIVATIONS[activation]())
        if dropout and i < len(activations) - 1:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


def conv_net(last: nn.Module) -> nn.Sequential:
    """Two convolutions with pooling and two linear layers for images of 28 x 28 given as rows of 784."""
    net = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(784, 64),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(64, 10),
        last,
    )
    for layer in net:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            initialise_(layer, "glorot", bias=0.1)
    return net


def zero_linear(width: int, *, bias: bool = True) -> nn.Sequential:
    """Return one linear unit that starts from zero."""
    layer = nn.Linear(width, 1, bias=bias)
    nn.init.zeros_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layer)
