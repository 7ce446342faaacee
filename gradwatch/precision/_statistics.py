"""What gradients and activations would lose in narrow formats, measured while training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..records import MODULE, PARAMETER, Column
from ..stats import Statistic, View, exponent_histograms
from ..torchside import wide_dtype
from ._exponents import lost, scale_exponents
from ._formats import FORMATS, cast_loss

__all__ = ["ActivationFormats", "GradientFormats"]

Array = NDArray[np.float64]

_SCALED = ("float16", "float8_e4m3", "float8_e5m2")
_IN_BLOCKS = ("mxfp8_e4m3", "mxfp4")

_ZERO = torch.zeros(())
_WHEN = "one step in 100"


def _column(name: str, kind: str, of: str, to: str) -> Column:
    whose = "module" if kind == MODULE else "weight"
    return Column(
        name=name,
        kind=kind,
        unit="share",
        scale="share",
        meaning=f"Share of each {whose}’s {of}, of what is not 0, that would become 0 in {to}.",
        label=f"{of}s lost in {to}",
        when=_WHEN,
        absent="nothing in it differs from 0",
    )


class ActivationFormats(Statistic):
    """Share of each module's output that would become 0 in float16 as it is, and in 8 bits with a scale per tensor."""

    needs = frozenset({"outputs"})
    every = 100
    num_sums = 256
    num_maxima = 1

    @classmethod
    def columns(cls) -> tuple[Column, ...]:
        return tuple(_column(f"activation_lost_{name}", MODULE, "output", name) for name in _SCALED)

    def sums(self, view: View) -> Tensor:
        """Return counts of magnitudes by exponent, over all tensors of the output; shape (1, 256)."""
        counts = exponent_histograms(view.outputs).sum(0, keepdim=True)
        # Wide floats hold counts up to 2**53 exactly; where there are only narrow ones, to seven digits.
        return (counts[:, :256] + counts[:, 256:]).to(wide_dtype(counts.device))

    def maxima(self, view: View) -> Tensor:
        """Return the largest finite magnitude, shape (1, 1)."""
        largest = [torch.where(t.isfinite(), t.abs(), 0).amax() for t in view.outputs if t.numel()]
        return view.rows([torch.stack([t.to(wide_dtype(t.device)) for t in largest]).amax()] if largest else [_ZERO])

    def finish(self, sums: Array, maxima: Array) -> dict[str, Any]:
        found = {}
        for name in _SCALED:
            to = FORMATS[name]
            exponents = scale_exponents(maxima[:, 0], to) if to.scaling else 0
            found[f"activation_lost_{name}"] = lost(sums, to, exponents)[:, 0]
        return found


class GradientFormats(Statistic):
    """What each weight's gradient would lose in formats with a scale per 32 entries (OCP Microscaling).

    The share of its entries that become 0, and the relative error of the whole (root of the squared error over the
    squared sum). Weights of two or more dimensions alone: vectors are kept wide by every recipe.
    """

    every = 100
    num_sums = 4 * len(_IN_BLOCKS)

    @classmethod
    def columns(cls) -> tuple[Column, ...]:
        losses = [_column(f"grad_lost_{name}", PARAMETER, "gradient", name) for name in _IN_BLOCKS]
        errors = [
            Column(
                name=f"grad_error_{name}",
                kind=PARAMETER,
                meaning=f"Relative error of each weight’s gradient after a cast to {name}.",
                label=f"gradient error in {name}",
                when=_WHEN,
                absent="the parameter has fewer than two dimensions",
            )
            for name in _IN_BLOCKS
        ]
        return (*losses, *errors)

    def sums(self, view: View) -> Tensor:
        """Return, for each format, entries above 0, those lost, squared error and squared sum; shape (n, 8)."""
        rows = [self._row(grad) for grad in view.grads]
        return view.rows(*(list(column) for column in zip(*rows, strict=True)))

    def _row(self, grad: Tensor) -> list[Tensor]:
        row: list[Tensor] = []
        for name in _IN_BLOCKS:
            if grad.dim() < 2 or not grad.is_floating_point():
                row += [torch.zeros((), device=grad.device)] * 4
                continue
            loss = cast_loss(grad, name)
            # What is not finite must not read as a tensor that loses nothing.
            spoilt = torch.where(grad.isfinite().all(), 0.0, torch.nan)
            parts = (loss.num_nonzero, loss.num_underflows, loss.squared_error, loss.squared_sum)
            row += [part + spoilt for part in parts]
        return row

    def finish(self, sums: Array, maxima: Array) -> dict[str, Any]:
        found: dict[str, Any] = {}
        with np.errstate(invalid="ignore", divide="ignore"):
            for i, name in enumerate(_IN_BLOCKS):
                nonzero, under, error, square = sums[:, 4 * i : 4 * i + 4].T
                found[f"grad_lost_{name}"] = under / nonzero
                found[f"grad_error_{name}"] = np.sqrt(error / square)
        return found
