"""What taking a batch apart has shown: one row per sample."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..records import Sample

__all__ = ["PerSample"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PerSample:
    """Losses and gradients of the samples of one batch.

    Attributes:
        share: float64, shape (B,): each sample's gradient projected on the whole one, in parts of 1.
        norm: float64, shape (B,): of each sample's gradient as a part of the whole one.
        cosine: float64, shape (B,): between each sample's gradient and the whole one.
        loss: float64, shape (B,); NaN where the loss function is not known.
        is_finite: bool, shape (B,).
        positions: float64, shape (B, T): the share of each place of a sequence; None without sequences.
        losses: float64, shape (B, T): the loss at each place of a sequence; None where there are none.
        projection: float64, shape (B,): the shares before they are divided by their sum; of several micro-batches and
            ranks these add up.
        coverage: share of the whole gradient's square that the parameters hold whose samples were told apart; 1 where
            it is all of it.
        method: `"graph"` (exact, from one backward), `"func"` (exact, `torch.func`) or `"halving"` (a few samples).
        is_checked: a backward of half of the samples came to the same as their rows.
    """

    share: Floats
    norm: Floats
    cosine: Floats
    loss: Floats
    is_finite: NDArray[np.bool_]
    projection: Floats
    positions: Floats | None = None
    losses: Floats | None = None
    coverage: float = 1.0
    method: str = "graph"
    is_checked: bool = False
    dataset_index: tuple[int, ...] | None = field(default=None)

    def __len__(self) -> int:
        return len(self.share)

    def top(self, count: int = 5) -> list[Sample]:
        """Return the samples that carry the most of the gradient, largest first; those that are not finite before
        all others."""
        carried = np.where(np.isfinite(self.share), np.abs(self.share), -1.0)
        order = np.lexsort((-carried, self.is_finite))
        return [self.sample(int(i)) for i in order[:count]]

    def sample(self, index: int) -> Sample:
        """Return one row."""
        position, position_share = None, float("nan")
        if self.positions is not None and np.isfinite(self.positions[index]).any():
            position = int(np.nanargmax(np.abs(self.positions[index])))
            position_share = float(self.positions[index, position])
        return Sample(
            index=index,
            share=float(self.share[index]),
            norm=float(self.norm[index]),
            cosine=float(self.cosine[index]),
            loss=float(self.loss[index]),
            is_finite=bool(self.is_finite[index]),
            dataset_index=None if self.dataset_index is None else self.dataset_index[index],
            position=position,
            position_share=position_share,
        )
