"""How optimizers step: the largest curvature that they bear, and the metric in which they measure it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..torchside import is_host

__all__ = ["OPTIONS", "STATES", "Way", "unbiased", "way_of"]

STATES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "step")
OPTIONS = ("betas", "eps", "alpha", "momentum", "dampening", "nesterov")
"""What is asked of a parameter's state and group."""


class Way(NamedTuple):
    """How an optimizer steps.

    Attributes:
        most: the largest curvature that it bears, times the learning rate.
        noise: the share of it that gradients of noise show.
        moment, eps, beta2, count: of the second moment whose root it divides by; none: None.
    """

    most: float
    noise: float
    moment: Tensor | None = None
    eps: float = 0.0
    beta2: float = 0.0
    count: Any = 1.0

    @property
    def unbiased(self) -> Any:
        """What the moment is multiplied by to be without its bias towards 0: a number, or a tensor on a device."""
        return unbiased(self.beta2, self.count)

    def metric(self, moment: Tensor) -> Tensor:
        """Return what squared steps are weighed by."""
        scale = self.unbiased
        scale = scale.to(moment.device, non_blocking=True) if isinstance(scale, Tensor) else scale
        return (moment * scale).clamp(min=0).sqrt() + self.eps


def unbiased(beta: float, count: Any) -> Any:
    """Return what a mean over so many steps is multiplied by to be without its bias towards 0: a number, or a tensor
    on a device, where the count lies there."""
    if isinstance(count, Tensor) and is_host(count.device):
        count = float(count)
    return 1 / (1 - beta**count)


def way_of(held: Mapping[str, Any]) -> Way | None:
    """Return how a parameter is stepped whose optimizer keeps these states and options; None of one not known."""
    eps, moment = held["eps"], held["exp_avg_sq"]
    if moment is not None and isinstance(held["betas"], (tuple, list)) and eps is not None and held["step"] is not None:
        beta1, beta2 = map(float, held["betas"][:2])
        moment = moment if held["max_exp_avg_sq"] is None else held["max_exp_avg_sq"]
        return Way(2 * (1 + beta1) / (1 - beta1), (1 - beta1) / 2, moment, float(eps), beta2, held["step"])
    if held["momentum"] is None:
        return None
    beta = float(held["momentum"])
    if held["square_avg"] is not None and held["alpha"] is not None and eps is not None:
        return Way(2 * (1 + beta), (1 - beta) / 2, held["square_avg"], float(eps))
    if held["dampening"] is None or held["nesterov"] is None:
        return None
    if held["nesterov"]:
        # The step is that of the gradient, and beta times that of all: their squares add up to what noise is over.
        most = 2 * (1 + beta) / (1 + 2 * beta)
        return Way(most, (1 + beta) / ((1 + beta) ** 2 + beta**4 / (1 - beta**2)) / most)
    return Way(2 * (1 + beta) / max(1 - float(held["dampening"]), 1e-3), (1 - beta) / 2)
