"""Largest logit and entropy of each attention head, measured while training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError
from ..records import Column, column_of
from ..stats import Statistic, View, attention_sums

__all__ = ["AttentionScores"]

Array = NDArray[np.float64]

_NAMES = ("attention_logit_max", "attention_logit_head", "attention_entropy", "attention_entropy_min")


class AttentionScores(Statistic):
    """Largest logit and entropy of each head, wherever attention is computed in a way that is known.

    The logits are recomputed from queries and keys in float32, a block at a time, with the call's scale, mask and
    causal flag; masked places do not count. An entropy is given as a share of what it can be at most, the logarithm of
    the number of places that a query may look at.

    Args:
        every: measured at one optimizer step in this many, and at the powers of two below it.
        most_heads: of one module.
        on_record: numbers of single heads stand on record where the model has so many heads or fewer; those of modules
            always.

    Raises:
        ConfigError: a number below 1 (`on_record`: below 0).
    """

    name = "attention"
    needs = frozenset({"attention"})
    every = 50
    num_sums = 256
    num_maxima = 128

    def __init__(self, every: int = 50, most_heads: int = 128, on_record: int = 256) -> None:
        for name, value, least in (("every", every, 1), ("most_heads", most_heads, 1), ("on_record", on_record, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"AttentionScores: `{name}` is a whole number of at least {least}. Got {value!r}.")
        self.every, self.num_sums, self.num_maxima = every, 2 * most_heads, most_heads
        self.on_record = on_record

    @classmethod
    def columns(cls) -> tuple[Column, ...]:
        return tuple(column for name in _NAMES if (column := column_of(name)) is not None)

    def sums(self, view: View) -> Tensor | None:
        """Return sums of entropies and of their bounds for each head, shape (1, 2 * most_heads)."""
        assert view.attention is not None
        sums, peaks = attention_sums(view.attention)
        if len(peaks) > self.num_maxima:
            raise ValueError(
                f"{view.paths[0]} has {len(peaks)} heads, it looks at {self.num_maxima} of a module at the most: "
                f"AttentionScores(most_heads={len(peaks)})"
            )
        view.memory["peaks"] = peaks
        return self._padded(sums.T, 0.0).reshape(1, -1)

    def maxima(self, view: View) -> Tensor | None:
        """Return the largest logit of each head, shape (1, most_heads)."""
        return self._padded(view.memory.pop("peaks")[None], -torch.inf)

    def _padded(self, rows: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(rows, (0, self.num_maxima - rows.shape[1]), value=value)

    def finish(self, sums: Array, maxima: Array) -> dict[str, Any]:
        n, width = maxima.shape
        entropies, bounds = sums.reshape(n, 2, width).transpose(1, 0, 2)
        is_there = ~np.isneginf(maxima)
        with np.errstate(invalid="ignore", divide="ignore"):
            of_heads = np.where(is_there, entropies / bounds, np.nan)
            # Where each query has but one place to look at, there is no entropy to speak of.
            lowest = np.where(bounds == 0, np.inf, of_heads).min(axis=1)
            found: dict[str, Any] = {
                "attention_logit_max": maxima.max(axis=1),
                "attention_logit_head": maxima.argmax(axis=1).astype(np.float64),
                "attention_entropy": entropies.sum(axis=1) / bounds.sum(axis=1),
                "attention_entropy_min": np.where(np.isinf(lowest), np.nan, lowest),
            }
        if is_there.sum() <= self.on_record:
            found |= {"attention_logit_max/": np.where(is_there, maxima, np.nan), "attention_entropy/": of_heads}
        return found
