"""Measurements that move before the loss does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..records import SCALAR
from ..stats import Statistic, View
from ._sampled import ENTRIES, Layout, packed, row, share
from ._ways import unbiased

__all__ = ["AdamUpdateRms", "GradientTurn"]

Array = NDArray[np.float64]

_STATES = ("exp_avg_sq", "step")


class AdamUpdateRms(Statistic):
    """Root mean square of gradient over Adam's second moment: 1 is usual; above 2 or 3 the moment is out of date.

    Adam divides by a mean over some 1 / (1 - beta2) steps. Where gradients grow faster than that, updates are larger
    than the learning rate says, and the loss jumps some steps later (StableAdamW, arXiv 2304.13013, section 3.4).
    Over a fixed sample of entries of each parameter; nothing for other optimizers.
    """

    needs = frozenset({"gradients", "optimizer_state"})
    num_sums = 2
    scale = "linear"
    guide = 1.0
    label = "gradient over second moment"
    entries: int | None = ENTRIES
    """Of each parameter that are looked at; None: all."""

    def sums(self, view: View) -> Tensor | None:
        """Return sum of the squared ratio and number of entries, shape (n, 2); None where nothing has a moment."""
        moments = [_moment(*held) for held in zip(view.grads, *map(view.state, _STATES), strict=True)]
        if all(moment is None for moment in moments):
            return None
        squares, layout = packed(view.grads, self.entries, view.memory.get("layout"))
        view.memory["layout"], squares = layout, squares.square()
        betas = [b[1] if isinstance(b, (tuple, list)) else 0.0 for b in view.options("betas")]
        made = self._made(squares, layout, moments, betas, view.state("step"))
        # What is not finite in a gradient is so in its moment, too: nan.
        ratio = squares / made.clamp_(min=torch.finfo(made.dtype).tiny)
        counts = row([0.0 if m is None else float(n) for m, n in zip(moments, layout.numels, strict=True)], squares)
        return torch.stack([torch.where(counts > 0, layout.sums(ratio), 0), counts], dim=1)

    def _made(
        self, squares: Tensor, layout: Layout, moments: list[Tensor | None], betas: Sequence[Any], steps: Sequence[Any]
    ) -> Tensor:
        """Return the moments' entries as this gradient will make them, without their bias towards 0."""
        held = [squares.new_zeros(n) if m is None else m for m, n in zip(moments, layout.numels, strict=True)]
        scales = row([unbiased(b, 1 if c is None else c + 1) for b, c in zip(betas, steps, strict=True)], squares)
        rates = row(betas, squares)
        last, _ = packed(held, self.entries, layout)
        return (layout.spread(rates * scales, squares) * last).addcmul_(
            layout.spread((1 - rates) * scales, squares), squares
        )

    def finish(self, sums: Array, maxima: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.sqrt(sums[:, 0] / sums[:, 1])


class GradientTurn(Statistic):
    """Cosine of the whole gradient with that of the step before: near -1 steps go beyond the valley and back.

    Where the learning rate is above 2 over the largest curvature, the gradient along that direction changes its sign
    at every step and grows, long before that shows in the loss. Over a fixed sample of entries of each parameter, of
    which a copy is kept.
    """

    kind = SCALAR
    num_sums = 3
    scale, signed = "linear", True
    label = "cosine with the last gradient"
    entries: int | None = ENTRIES
    """Of each parameter that are looked at; None: all."""

    def sums(self, view: View) -> Tensor | None:
        """Return the product with the last gradient and both squares, shape (n, 3); None at the first step."""
        memory = view.memory
        last = memory.get("last")
        now, memory["layout"] = packed(view.grads, self.entries, memory.get("layout"))
        memory["last"] = now
        if last is None or last.shape != now.shape:
            return None
        layout: Layout = memory["layout"]
        weights = row([share(g, self.entries) for g in view.grads], now)
        rows = [layout.sums(entries) * weights for entries in (last * now, last.square(), now.square())]
        return torch.stack(rows, dim=1)

    def finish(self, sums: Array, maxima: Array) -> float:
        product, last, now = sums.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.float64(product) / np.sqrt(np.float64(last) * now))


def _moment(grad: Tensor, moment: Tensor | None, step: Any) -> Tensor | None:
    """Return a second moment with an entry for each of the gradient's; None where there is no such."""
    return moment if moment is not None and step is not None and moment.shape == grad.shape else None
