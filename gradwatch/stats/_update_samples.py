"""Samples of a tensor's elements, where a copy of all of them takes too much memory."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ..torchside import sent, wide_dtype

__all__ = ["Sample", "can_sample", "least_room", "room_for_each"]

_BLOCK = 64
"""Elements that are taken together: a gather of whole cache lines costs little more than a copy."""
_FEWEST = 2
"""Blocks without which nothing can be said of the error."""


def room_for_each(needs: Sequence[int], limit: int) -> int:
    """Return the bytes that each tensor may take at the most, so that all together take no more than the limit.

    What small ones leave over, the large ones share.
    """
    left = limit
    for count, need in zip(range(len(needs), 0, -1), sorted(needs), strict=True):
        if need * count > left:
            return left // count
        left -= need
    return max(needs, default=0)


def least_room(numel: int, element_size: int) -> int:
    """Return the bytes that the smallest sample of so many elements, or of fewer, takes."""
    return min((_FEWEST + 1) * _BLOCK, numel) * element_size


def can_sample(piece: Tensor) -> bool:
    """Return whether a tensor's elements fill its memory, each once, and are real."""
    return not piece.is_complex() and _in_order(piece).is_contiguous()


class Sample:
    """Blocks of a tensor drawn at random, each alike; the same ones for as long as it lives. The last elements, which
    fill no block, are always among them.

    Sums over all elements are estimated from those over the blocks, times the number of blocks over those drawn: right
    on the average over draws, whatever the elements are (Cochran, "Sampling techniques", 3rd edition 1977, chapter 9:
    clusters of equal size, drawn without replacement).

    Args:
        piece: whose elements; see `can_sample`.
        room: bytes that a copy of the sample may take.
        seed: of the draw.
    """

    def __init__(self, piece: Tensor, room: int, seed: int) -> None:
        size = piece.element_size()
        self._num_blocks, self._tail = divmod(piece.numel(), _BLOCK)
        drawn = min(self._num_blocks, max((room - self._tail * size) // (_BLOCK * size), _FEWEST))
        chosen = sorted(random.Random(seed).sample(range(self._num_blocks), drawn))
        self._chosen = sent(torch.tensor(chosen, dtype=torch.int64), piece.device)

    @property
    def shape(self) -> torch.Size:
        """Of a copy: a row of the elements that are taken."""
        return torch.Size((len(self._chosen) * _BLOCK + self._tail,))

    def copy(self, piece: Tensor, into: Tensor) -> None:
        """Copy the sampled elements of a tensor into a row of this `shape`."""
        row = _row(piece)
        end = self._num_blocks * _BLOCK
        blocks = into[: len(self._chosen) * _BLOCK].view(-1, _BLOCK)
        torch.index_select(row[:end].view(-1, _BLOCK), 0, self._chosen, out=blocks)
        into[len(blocks) * _BLOCK :].copy_(row[end:])

    def of(self, piece: Tensor) -> Tensor:
        """Return the sampled elements of another tensor of the same shape, a row of this `shape`."""
        row = torch.empty(self.shape, dtype=piece.dtype, device=piece.device)
        self.copy(piece, row)
        return row

    def moved(self, before: Tensor, piece: Tensor) -> Tensor:
        """Return estimates for the whole, wide, shape (3,): the sum of squares of (tensor - what it was), that of what
        it was, and the variance of the first. `before`, as `copy` left it, is overwritten."""
        wide = wide_dtype(piece.device)
        now = self.of(piece)
        norms = self._squares(before, wide)
        before.sub_(now)
        moves = self._squares(before, wide)
        drawn = len(self._chosen)
        factor = self._num_blocks / max(drawn, 1)
        found = [factor * squares[:-1].sum() + squares[-1] for squares in (moves, norms)]
        spread = moves[:-1].var() if drawn > 1 else moves.new_zeros(())
        return torch.stack([*found, spread * (factor * (self._num_blocks - drawn))])

    def _squares(self, row: Tensor, wide: torch.dtype) -> Tensor:
        """Return the sums of squares of the blocks, and that of the last elements."""
        end = len(self._chosen) * _BLOCK
        blocks = torch.linalg.vector_norm(row[:end].view(-1, _BLOCK), dim=1, dtype=wide)
        return torch.cat([blocks, torch.linalg.vector_norm(row[end:], dtype=wide)[None]]).square_()


def _in_order(piece: Tensor) -> Tensor:
    """Return a view whose dimensions come in the order in which they lie in memory."""
    if piece.is_contiguous():
        return piece
    return piece.permute(sorted(range(piece.dim()), key=piece.stride, reverse=True))


def _row(piece: Tensor) -> Tensor:
    return _in_order(piece).view(-1)
