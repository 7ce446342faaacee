"""Curvature along the last step, against what the optimizer bears: from two gradients, without further passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..records import SCALAR, Column, column_of
from ..stats import Statistic, View
from ._sampled import ENTRIES, Layout, packed, row, share
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

    With it goes `slope_after_step`, the present gradient times the last step, whatever the optimizer: the change of the
    loss that a further bit of that step would bring. The batch is another one than those which made the step, so that
    its mean over steps is that of the whole loss, without noise of its own.

    Over a fixed sample of entries of each parameter, of which copies are kept; no curvature for other optimizers.
    """

    kind = SCALAR
    needs = frozenset({"gradients", "parameters", "optimizer_state"})
    num_sums = 4
    scale, signed = "linear", True
    guide = 1.0
    label = "curvature along the step"
    entries: int | None = ENTRIES
    """Of each parameter that are looked at; None: all."""

    @classmethod
    def columns(cls) -> tuple[Column, ...]:
        slope = column_of("slope_after_step")
        return super().columns() if slope is None else (*super().columns(), slope)

    def sums(self, view: View) -> Tensor | None:
        """Return step times change of the gradient and the squared step in the metric of what is borne, both without
        what noise gives; step times gradient; and of how many entries, where the optimizer is known. Shape (n, 4);
        None at the first step."""
        memory = view.memory
        last, rates = memory.get("last"), memory.get("rates")
        params, memory["layout"] = packed(view.params, self.entries, memory.get("layout"))
        layout: Layout = memory["layout"]
        grads, _ = packed(view.grads, self.entries, layout)
        # The rates are those of the coming step.
        memory["last"], memory["rates"] = (params, grads), [_kept(rate) for rate in view.options("lr")]
        if last is None or rates is None or last[0].shape != params.shape:
            return None
        step, shares = params - last[0], row([share(param, self.entries) for param in view.params], params)
        slopes, ways = layout.sums(step * grads), _ways(view)
        if ways is None:
            nothing = torch.zeros_like(slopes)
            return torch.stack([nothing, nothing, slopes * shares, nothing], dim=1)
        squares = layout.sums(step.square().mul_(self._weights(ways, layout, step)))
        products = slopes - layout.sums(step.mul_(last[1]))
        # At a rate of 0 nothing moved but what somebody else did.
        squares = squares * row([_over(way.most, rate) for way, rate in zip(ways, rates, strict=True)], step)
        noise = row([way.noise for way in ways], step)
        curved, borne = products - noise * squares, squares * (1 - noise)
        return torch.stack([curved * shares, borne * shares, slopes * shares, row(layout.numels, step)], dim=1)

    def _weights(self, ways: list[Way], layout: Layout, step: Tensor) -> Tensor | float:
        """Return what the squared step's entries are weighed by: roots of second moments, where there are any."""
        if all(way.moment is None for way in ways):
            return 1.0
        held = [
            torch.ones(n, device=step.device) if w.moment is None else w.moment
            for w, n in zip(ways, layout.numels, strict=True)
        ]
        moments, _ = packed(held, self.entries, layout)
        scales = layout.spread(row([way.unbiased for way in ways], step), step)
        return (moments * scales).clamp(min=0).sqrt() + layout.spread([way.eps for way in ways], step)

    def finish(self, sums: Array, maxima: Array) -> dict[str, float]:
        product, square, slope, known = sums.sum(axis=0)
        found = {"slope_after_step": float(slope)}
        if known:
            with np.errstate(invalid="ignore", divide="ignore"):
                found["step_curvature"] = float(np.float64(product) / square)
        return found


def _over(most: float, rate: Any) -> Any:
    return most / rate if isinstance(rate, Tensor) or rate else 0.0


def _kept(rate: Any) -> Any:
    return rate.detach().clone() if isinstance(rate, Tensor) else rate


def _ways(view: View) -> list[Way] | None:
    """Return for each parameter how it is stepped; None where that is not known of all."""
    columns: list[Any] = [*map(view.state, STATES), *map(view.options, OPTIONS)]
    ways = [way_of(dict(zip((*STATES, *OPTIONS), row, strict=True))) for row in zip(*columns, strict=True)]
    known = [way for way in ways if way is not None]
    return known if len(known) == len(ways) else None
