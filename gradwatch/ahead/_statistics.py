"""Measurements that move before the loss does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..records import SCALAR
from ..stats import Statistic, View
from ..torchside import sent, wide_dtype
from ._sampled import ENTRIES, Layout, packed, sampled, share

__all__ = ["AdamUpdateRms", "GradientTurn"]

Array = NDArray[np.float64]


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
        moments, steps, betas = view.state("exp_avg_sq"), view.state("step"), view.options("betas")
        if all(moment is None for moment in moments):
            return None
        rows = list(map(self._row, view.grads, moments, steps, betas))
        return view.rows([row[0] for row in rows], [row[1] for row in rows])

    def _row(self, grad: Tensor, moment: Tensor | None, step: Any, betas: Any) -> tuple[Tensor, Tensor]:
        if moment is None or step is None or not isinstance(betas, (tuple, list)):
            nothing = torch.zeros((), device=grad.device)
            return nothing, nothing
        square, held = _wide(sampled(grad, self.entries)).square(), _wide(sampled(moment, self.entries))
        beta = float(betas[1])
        # The moment as this gradient will make it, without its bias towards 0.
        count = (step + 1.0).to(grad.device, non_blocking=True) if isinstance(step, Tensor) else step + 1.0
        made = (beta * held + (1 - beta) * square) / (1 - beta**count)
        ratio = torch.where(square > 0, square / made.clamp(min=torch.finfo(made.dtype).tiny), 0)
        ratio = torch.where(square.isfinite(), ratio, torch.nan)
        return ratio.sum(), torch.full((), float(ratio.numel()), device=grad.device)

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
        weights = sent(torch.tensor([share(g, self.entries) for g in view.grads], dtype=now.dtype), now.device)
        rows = [layout.sums(entries) * weights for entries in (last * now, last.square(), now.square())]
        return torch.stack(rows, dim=1)

    def finish(self, sums: Array, maxima: Array) -> float:
        product, last, now = sums.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.float64(product) / np.sqrt(np.float64(last) * now))


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(wide_dtype(values.device))
