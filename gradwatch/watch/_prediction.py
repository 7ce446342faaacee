"""What a model's output is in numbers, taken while it is at hand and before its memory goes back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..torchside import declassed, unmasked_attention, values, wide_dtype
from ._numbers import Numbers, Scalars

__all__ = [
    "KEPT_AT_LEAST",
    "KEPT_AT_MOST",
    "Forward",
    "Prediction",
    "blocks",
    "extremes",
    "predicted",
    "row_sums",
]


KEPT_AT_LEAST, KEPT_AT_MOST = 2**14, 2**18
"""Bounds of how many elements an output may have to be kept until the step is measured."""
_OF_SEQUENCES = 3
"""Dimensions of outputs that have one row of scores a place."""
_LOG_Z_ROWS, _LOG_Z_ELEMENTS = 2**10, 2**18
"""Rows of scores that `output_log_z` is the mean of, and how many elements they may have, at the most."""
_SMALLEST_BLOCK = 2**13
_NUM_BLOCKS = 256


@dataclass(frozen=True)
class Forward:
    """What is kept of one forward pass: numbers, and nothing of its batch, its outputs or its graph.

    Attributes:
        num_samples: in the batch; 0 where unknown.
        numbers: of batch and outputs, as `batch_scalars` gives them; None on a step that is not sampled.
    """

    num_samples: int = 0
    numbers: Mapping[str, Tensor | float] | None = None


@dataclass(frozen=True)
class Prediction:
    """What is kept of a model's output until its step is measured.

    A language model's logits are the largest tensor of its training, and gone again before backward begins: held until
    the step they would be what it runs out of memory by.

    Attributes:
        scalars: of the output alone.
        shape: of the output.
        values: the output itself without its graph, where it is small; else None.
        missed: which scalars can't be measured, and why.
    """

    scalars: Scalars
    shape: torch.Size
    values: Tensor | None
    missed: tuple[tuple[str, Exception], ...] = ()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)


def predicted(pred: Tensor, kept: int = 0) -> Prediction:
    """Return what is kept of an output: its values too where they are no more than `kept`. Reads nothing back."""
    made_by = pred
    pred = declassed(pred)
    missed: list[tuple[str, Exception]] = []
    copied = pred.clone() if pred.numel() <= kept else None
    numbers = Numbers(lambda what, error: missed.append((what, error)))
    # Rows of several lengths have no shape, and are no matrix.
    is_nested = pred.is_nested
    numbers.ask("the outputs", (_range,) if is_nested else (_range, _units, _variance, _row_sums, _log_z), pred)
    if pred.ndim == _OF_SEQUENCES:
        numbers.ask("the outputs", (_attention,), made_by)
    return Prediction(numbers.found, torch.Size() if is_nested else pred.shape, copied, tuple(missed))


def _attention(pred: Tensor) -> Scalars:
    """Of sequences: which share of the attention behind them sees every place."""
    share = unmasked_attention(pred)
    return {} if share is None else {"attention_sees_all": share}


def _range(pred: Tensor) -> Scalars:
    low, high = extremes(pred)
    return {"output_min": low, "output_max": high}


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest element of a tensor of any kind, in wide precision."""
    stored, zeros = values(x) if x.is_floating_point() else (x, 0)
    if zeros:
        stored = torch.cat([stored.reshape(-1), stored.new_zeros(1)])
    low, high = torch.aminmax(stored)
    wide = wide_dtype(x.device)
    return low.to(wide), high.to(wide)


def _units(pred: Tensor) -> Scalars:
    return {"output_units": float(pred.numel() // max(pred.shape[0], 1))}


def _variance(pred: Tensor) -> Scalars:
    """How much it differs over the batch."""
    if pred.shape[0] < 2:
        return {}
    wide = wide_dtype(pred.device)
    found = [part.to(wide).var(dim=0, correction=0).amax() for part in blocks(_flat(pred), keep=0)]
    return {"output_batch_variance": torch.stack(found).amax()}


def _row_sums(pred: Tensor) -> Scalars:
    if pred.ndim < 2 or pred.shape[1] < 2:
        return {}
    low, high = row_sums(pred)
    return {"output_row_sum_min": low, "output_row_sum_max": high}


def _log_z(pred: Tensor) -> Scalars:
    """Return the mean of log Z over rows spread through the batch.

    Scores are the last dimension of matrices and sequences, dimension 1 of what has more, as in torch's losses.
    """
    scores = pred.movedim(1, -1) if pred.ndim > _OF_SEQUENCES else pred
    if pred.ndim < 2 or scores.shape[-1] < 2:
        return {}
    lead, room = scores.shape[:-1], min(_LOG_Z_ELEMENTS, max(_SMALLEST_BLOCK, pred.numel() // 16))
    step = -(-math.prod(lead) // max(1, min(_LOG_Z_ROWS, room // scores.shape[-1])))
    chosen: list[Tensor] = []
    left = torch.arange(0, math.prod(lead), step, device=pred.device)
    for size in reversed(lead):
        chosen.insert(0, left % size)
        left = left // size
    return {"output_log_z": scores[tuple(chosen)].float().logsumexp(dim=-1).mean()}


def row_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest of the sums over dimension 1, summed in wide precision."""
    wide = wide_dtype(x.device)
    found = [torch.aminmax(part.to(wide).sum(dim=1)) for part in blocks(x, keep=1)]
    return torch.stack([low for low, _ in found]).amin(), torch.stack([high for _, high in found]).amax()


def blocks(x: Tensor, *, keep: int) -> Iterator[Tensor]:
    """Yield pieces of a tensor, as views, that together are all of it and are each a small part of a large one.

    Args:
        x: of one or more dimensions.
        keep: a dimension that is not cut.
    """
    yield from _cut(x, keep, max(_SMALLEST_BLOCK, x.numel() // _NUM_BLOCKS))


def _cut(x: Tensor, keep: int, largest: int) -> Iterator[Tensor]:
    dims = [d for d in range(x.ndim) if d != keep and x.shape[d] > 1]
    if x.numel() <= largest or not dims:
        yield x
        return
    # The longest, the last of several: pieces that lie together in memory would be small ones of the first.
    dim = max(dims, key=lambda d: x.shape[d])
    per_slice = x.numel() // x.shape[dim]
    for piece in x.split(max(1, largest // per_slice), dim):
        yield from _cut(piece, keep, largest)


def _flat(pred: Tensor) -> Tensor:
    """Return an output as (batch, units), or as it is where that would be a copy."""
    try:
        return pred.view(len(pred), -1)
    except RuntimeError:
        return pred
