"""Histograms by binary exponent: the same bins for every layer, step and rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..torchside import home, is_host
from ._device import scanned
from ._native import native
from ._packed import NUM_BINS, counted, exponent_codes
from ._shards import Shards, alike, put_together

__all__ = ["NUM_BINS", "exponent_histograms", "local_histograms"]

_CHUNK = 1 << 16
_WORTH_NATIVE = 1 << 16


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
    return shards.sum_(shards.add_unstored_(local_histograms(shards.locals)))


def local_histograms(pieces: Sequence[Tensor]) -> Tensor:
    """Return exponent histograms of contiguous local pieces, int64, shape (n, 512)."""
    if not pieces:
        return torch.zeros(0, NUM_BINS, dtype=torch.int64)
    groups = alike(pieces)
    parts = [_of_one_kind([pieces[p] for p in positions]) for positions in groups]
    return put_together(parts, groups, home(pieces))


def _of_one_kind(pieces: Sequence[Tensor]) -> Tensor:
    """Return histograms of pieces of one device and dtype."""
    if not is_host(pieces[0].device):
        found = scanned(pieces, histograms=True)
        counts = counted(pieces, histograms=True)[1] if found is None else found[1]
        assert counts is not None
        return counts
    if kernels := native(pieces, worth=_WORTH_NATIVE):
        return torch.from_numpy(kernels.histograms(pieces))
    counts = torch.zeros(len(pieces), NUM_BINS, dtype=torch.int64)
    scratch = torch.empty(_CHUNK, dtype=torch.int32)
    for row, piece in zip(counts.unbind(), pieces, strict=True):
        for chunk in piece.view(-1).split(_CHUNK) if piece.numel() else ():
            row += torch.bincount(exponent_codes(chunk, scratch[: chunk.numel()]), minlength=NUM_BINS)
    return counts
