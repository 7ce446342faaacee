"""Histograms by binary exponent: the same bins for every layer, step and rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._device import scanned
from ._native import native
from ._shards import Shards, by_dtype

__all__ = ["NUM_BINS", "exponent_histograms", "local_histograms"]

NUM_BINS = 512
_CHUNK = 1 << 16
_WORTH_NATIVE = 1 << 16
_SHIFT = {torch.float32: (torch.int32, 23), torch.bfloat16: (torch.int16, 7)}


@torch.no_grad()
def exponent_histograms(tensors: Sequence[Tensor]) -> Tensor:
    """Return how many elements of each tensor have which binary exponent, with their sign.

    Args:
        tensors: as for `tensor_norms`.

    Returns:
        int64, shape (n, 512), on the tensors' device. Bin `k` counts positive values of magnitude in
        `[2**(k-127), 2**(k-126))`, bin `256 + k` negative ones; `k = 0` zeros and magnitudes below 2**-126, `k = 255`
        inf, nan and what float32 can't hold. Bins are float32's for every dtype. One SUM all-reduce per mesh dimension
        that DTensors among them are split over.
    """
    shards = Shards(tensors)
    return shards.sum_(local_histograms(shards.locals))


def local_histograms(pieces: Sequence[Tensor]) -> Tensor:
    """Return exponent histograms of contiguous local pieces, int64, shape (n, 512)."""
    if not pieces:
        return torch.zeros(0, NUM_BINS, dtype=torch.int64)
    if len(by_dtype(pieces)) == 1 and (found := scanned(pieces, histograms=True)) and found[1] is not None:
        return found[1]
    counts = torch.zeros(len(pieces), NUM_BINS, dtype=torch.int64, device=pieces[0].device)
    if pieces[0].device.type == "cpu":
        for positions in by_dtype(pieces):
            chosen = [pieces[p] for p in positions]
            kernels = native(chosen, worth=_WORTH_NATIVE)
            if kernels is not None:
                counts[positions] = torch.from_numpy(kernels.histograms(chosen))
            else:
                _count_all_(counts, positions, chosen)
        return counts
    _count_all_(counts, list(range(len(pieces))), pieces)
    return counts


def _count_all_(counts: Tensor, positions: list[int], pieces: Sequence[Tensor]) -> None:
    scratch = torch.empty(_CHUNK, dtype=torch.int32, device=pieces[0].device)
    for position, piece in zip(positions, pieces, strict=True):
        for chunk in piece.view(-1).split(_CHUNK) if piece.numel() else ():
            _count_(counts[position], chunk, scratch)


def _count_(row: Tensor, chunk: Tensor, scratch: Tensor) -> None:
    """Add the codes (sign and exponent, nine bits) of a chunk to a row of counts, through one reused scratch."""
    bits, shift = _SHIFT.get(chunk.dtype, (torch.int32, 23))
    if chunk.dtype not in _SHIFT:
        chunk = chunk.float()
    codes = scratch[: chunk.numel()]
    torch.bitwise_right_shift(chunk.view(bits), shift, out=codes)
    codes.bitwise_and_(0x1FF)
    if chunk.device.type == "cpu":
        row += torch.bincount(codes, minlength=NUM_BINS)
    else:
        # bincount reads its maximum back to the host; with fixed bins nothing needs to be read.
        row.index_add_(0, codes, torch.ones_like(codes, dtype=torch.int64))
