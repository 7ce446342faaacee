"""What the compiled kernels return, by torch alone and in float64: slow, and what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["agrees", "reference"]

_CHUNK, _NUM_CHUNKS = 1 << 12, 256
"""Pieces are looked at in chunks of so many elements or in so many chunks: wide copies stay small beside them."""
_BITS = {torch.float32: (torch.int32, 23), torch.bfloat16: (torch.int16, 7), torch.float64: (torch.int64, 52)}
_SMALLEST = {torch.float32: 1.2e-38, torch.bfloat16: 1.2e-38, torch.float64: 2.3e-308}


@torch.no_grad()
def reference(name: str, pieces: Sequence[Tensor], more: Sequence[Tensor] = ()) -> NDArray[np.float64]:
    """Return one row for each tensor: what the kernel `name` writes, float64, shape (n, width).

    Args:
        name: squares, moments, histograms, everything or moved.
        pieces: contiguous.
        more: where those went, for `moved`.
    """
    if name == "moved":
        rows = [_moved(before, after) for before, after in zip(pieces, more, strict=True)]
        return np.stack(rows) if rows else np.zeros((0, 2))
    rows = []
    for piece in pieces:
        parts = []
        if name in ("moments", "everything"):
            parts.append(_moments(piece))
        if name in ("histograms", "everything"):
            parts.append(_histogram(piece))
        if name == "squares":
            parts.append(_moments(piece)[1:2])
        rows.append(np.concatenate(parts))
    return np.stack(rows)


def agrees(name: str, found: NDArray[Any], expected: NDArray[np.float64], pieces: Sequence[Tensor]) -> bool:
    """Return whether a kernel's rows are the reference's but for rounding: counts and maxima exactly."""
    found = np.asarray(found, np.float64).reshape(len(pieces), -1)
    numels = np.asarray([piece.numel() for piece in pieces], np.float64)
    with np.errstate(all="ignore"):
        near = np.isclose(found, expected, rtol=1e-7, atol=0, equal_nan=True)
        # A processor that flushes what is denormal may do so in one and not in the other.
        smallest = _SMALLEST[pieces[0].dtype]
        near |= np.abs(found - expected) <= (numels * smallest)[:, None]
        if name in ("moments", "everything"):
            # A sum of both signs is known to the rounding of its addends, sqrt(n * sum of squares) at most.
            slack = 1e-9 * np.sqrt(numels * np.abs(expected[:, 1]))
            near[:, 0] |= np.abs(found[:, 0] - expected[:, 0]) <= slack
            near[:, 2:] = (found[:, 2:] == expected[:, 2:]) | (np.isnan(found[:, 2:]) & np.isnan(expected[:, 2:]))
        elif name == "histograms":
            near = found == expected
    return bool(near.all())


def _chunk(piece: Tensor) -> int:
    return max(_CHUNK, piece.numel() // _NUM_CHUNKS)


def _moments(piece: Tensor) -> NDArray[np.float64]:
    out = np.zeros(5)
    bits, shift = _BITS[piece.dtype]
    # The exponent of what is not finite; as in the kernel, zeros are told by their bits.
    limit = {23: 0x7F800000, 7: 0x7F80, 52: 0x7FF0000000000000}[shift]
    signless = torch.iinfo(bits).max
    for chunk in piece.view(-1).split(_chunk(piece)) if piece.numel() else ():
        wide, magnitude = chunk.double(), chunk.view(bits) & signless
        out[0] += wide.sum().item()
        out[1] += wide.square().sum().item()
        out[2] += (magnitude == 0).sum().item()
        out[3] += (magnitude >= limit).sum().item()
        most = torch.where(magnitude > limit, 0, magnitude).max().view(piece.dtype).item()
        out[4] = max(out[4], most)
    return out


def _histogram(piece: Tensor) -> NDArray[np.float64]:
    out = np.zeros(512)
    for chunk in piece.view(-1).split(_chunk(piece)) if piece.numel() else ():
        codes = (chunk.float().view(torch.int32) >> 23) & 0x1FF
        out += torch.bincount(codes, minlength=512).numpy()
    return out


def _moved(before: Tensor, after: Tensor) -> NDArray[np.float64]:
    out = np.zeros(2)
    if before.numel():
        chunks = zip(before.view(-1).split(_chunk(before)), after.view(-1).split(_chunk(before)), strict=True)
        for old, new in chunks:
            wide = old.double()
            out += [(wide - new.double()).square().sum().item(), wide.square().sum().item()]
    return out
