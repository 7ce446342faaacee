"""One sample of a batch, and what it did to the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._markup import Prints
from ._incident import _plain

__all__ = ["Sample"]


@dataclass(frozen=True, kw_only=True)
class Sample(Prints):
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
        dataset_index: which item of the data set it is (an index, or an id), where that is known.
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
    dataset_index: int | str | None = None
    position: int | None = None
    position_share: float = float("nan")

    def __str__(self) -> str:
        where = [f"sample {self.index}"]
        where += [] if self.dataset_index is None else [f"(item {self.dataset_index} of the data set)"]
        where += [f"of micro-batch {self.micro_batch}"] if self.micro_batch else []
        where += [f"on rank {self.rank}"] if self.rank else []
        share = f"carries {round(self.share, 2) + 0.0:.0%} of the gradient"
        told = [share if self.is_finite else "is not finite"]
        told += [f"norm {self.norm:.3g}"] if np.isfinite(self.norm) else []
        told += [f"loss {self.loss:.4g}"] if np.isfinite(self.loss) else []
        told += [] if self.position is None else [f"most of it at position {self.position}"]
        return f"{' '.join(where)} {', '.join(told)}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values; floats that are not finite as "nan", "inf" and "-inf"."""
        return {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sample:
        """Return what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        known = {name: value for name, value in data.items() if name in cls.__dataclass_fields__}
        floats = ("share", "norm", "cosine", "loss", "position_share")
        return cls(**{**known, **{name: float(known[name]) for name in floats if name in known}})
