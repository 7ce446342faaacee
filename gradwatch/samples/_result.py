"""What taking a batch apart has shown: one row per sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PerSample", "Sample"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample of a batch, and what it did to the gradient. Prints as the sentence a user reads.

    Attributes:
        index: its row in its micro-batch.
        share: of the gradient that it carries: its gradient's projection on the whole one. Shares of all samples sum
            to 1; below 0 it pulls the other way. NaN where the gradient is not finite.
        norm: of its own gradient, as far as it is a part of the whole one (divided by the batch size where the loss is
            a mean); NaN where it was not measured, or is not finite.
        cosine: between its gradient and the whole one.
        loss: its own, where the loss function is known; else NaN.
        is_finite: whether all that it made, forward and backward, is finite.
        micro_batch: which of the step's micro-batches.
        rank: which process.
        dataset_index: which item of the data set it is, where that is known.
        position: the place in the sequence that carries most of its share; None without sequences.
        position_share: how much of the whole gradient that place carries.
    """

    index: int
    share: float
    norm: float = float("nan")
    cosine: float = float("nan")
    loss: float = float("nan")
    is_finite: bool = True
    micro_batch: int = 0
    rank: int = 0
    dataset_index: int | None = None
    position: int | None = None
    position_share: float = float("nan")

    def __str__(self) -> str:
        where = [f"sample {self.index}"]
        where += [] if self.dataset_index is None else [f"(item {self.dataset_index} of the data set)"]
        where += [f"of micro-batch {self.micro_batch}"] if self.micro_batch else []
        where += [f"on rank {self.rank}"] if self.rank else []
        told = ["is not finite"] if not self.is_finite else [f"carries {self.share:.0%} of the gradient"]
        told += [f"norm {self.norm:.3g}"] if np.isfinite(self.norm) else []
        told += [f"loss {self.loss:.4g}"] if np.isfinite(self.loss) else []
        told += [] if self.position is None else [f"most of it at position {self.position}"]
        return f"{' '.join(where)} {', '.join(told)}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sample:
        return cls(**{name: value for name, value in data.items() if name in cls.__dataclass_fields__})


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
