"""Curvature along the last step, against what the optimizer bears: from two gradients, without further passes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..records import SCALAR
from ..stats import Statistic, View
from ..torchside import wide_dtype
from ._sampled import ENTRIES, sampled, share
from ._ways import OPTIONS, STATES, Way, way_of

__all__ = ["StepCurvature"]

Array = NDArray[np.float64]


class StepCurvature(Statistic):
    """Curvature of the loss along the last step: at 1 it is the largest that the optimizer bears, at 0 no news.

    The change of the gradient times the step, over the square of the step in the metric of the optimizer: a Rayleigh
    quotient of the (preconditioned) Hessian, which is no larger than its largest eigenvalue, and comes to it as a
    direction that diverges takes over the steps. What is borne is 2 (1 + momentum) / lr for SGD (Nesterov's: divided by
    1 + 2 momentum) and RMSprop (Cohen et al., arXiv 2103.00065), 2 (1 + beta1) / ((1 - beta1) lr) of the preconditioned
    Hessian for Adam and its kin (arXiv 2207.14484).

    Gradients that are nothing but noise of their batches give a share of that, too: a step follows the gradient that it
    was made of. That share, (1 - momentum) / 2 (a half under plain SGD, a twentieth under momentum of 0.9 and under
    Adam), is taken off, so that noise gives 0.

    Over a fixed sample of entries of each parameter, of which copies are kept; nothing for other optimizers.
    """

    kind = SCALAR
    needs = frozenset({"gradients", "parameters", "optimizer_state"})
    num_sums = 2
    scale, signed = "linear", True
    guide = 1.0
    label = "curvature along the step"
    entries: int | None = ENTRIES
    """Of each parameter that are looked at; None: all."""

    def sums(self, view: View) -> Tensor | None:
        """Return step times change of the gradient, and the squared step in the metric of what is borne, both without
        what noise gives, shape (n, 2); None at the first step, and for an optimizer that is not known."""
        ways, last = _ways(view), view.memory.get("last")
        now = [
            (self._wide(param).clone(), self._wide(grad).clone())
            for param, grad in zip(view.params, view.grads, strict=True)
        ]
        # The rates are those of the coming step.
        rates, view.memory["rates"] = view.memory.get("rates"), [_kept(rate) for rate in view.options("lr")]
        view.memory["last"] = now
        if last is None or rates is None or ways is None:
            return None
        products, squares = [], []
        for old, new, way, rate, param in zip(last, now, ways, rates, view.params, strict=True):
            weight, square = share(param, self.entries), self._square(new[0] - old[0], way, rate)
            products.append((((new[0] - old[0]) * (new[1] - old[1])).sum() - way.noise * square) * weight)
            squares.append(square * ((1 - way.noise) * weight))
        return view.rows(products, squares)

    def _square(self, step: Tensor, way: Way, rate: Any) -> Tensor:
        """Return the square of a step in the metric in which 1 is the largest curvature that is borne."""
        weights = 1.0 if way.moment is None else way.metric(self._wide(way.moment))
        square = (step.square() * weights).sum() * way.most
        if isinstance(rate, Tensor):
            return square / rate.to(step.device, non_blocking=True)
        # At a rate of 0 nothing moved but what somebody else did.
        return square / rate if rate else square * 0

    def _wide(self, tensor: Tensor) -> Tensor:
        return sampled(tensor.detach(), self.entries).to(wide_dtype(tensor.device))

    def finish(self, sums: Array, maxima: Array) -> float:
        product, square = sums.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.float64(product) / square)


def _kept(rate: Any) -> Any:
    return rate.detach().clone() if isinstance(rate, Tensor) else rate


def _ways(view: View) -> list[Way] | None:
    """Return for each parameter how it is stepped; None where that is not known of all."""
    columns: list[Any] = [*map(view.state, STATES), *map(view.options, OPTIONS)]
    ways = [way_of(dict(zip((*STATES, *OPTIONS), row, strict=True))) for row in zip(*columns, strict=True)]
    known = [way for way in ways if way is not None]
    return known if len(known) == len(ways) else None
