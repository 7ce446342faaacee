"""In-place arithmetic on tensors of any kind: plain, sharded, sparse."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import GradwatchError
from ..stats._scaling import scale_, times
from ..torchside import home, local_of, moved, writable

__all__ = ["Scratch", "as_dtensor", "chunks", "local_part", "on_values_", "scale_", "summed", "times"]


_CHUNK = 1 << 17


class Scratch:
    """One buffer for the temporaries of many chunks: fresh memory costs more than the arithmetic in it."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, Tensor] = {}

    def like(self, chunk: Tensor) -> Tensor:
        """Return a tensor of the chunk's shape and type, its contents undefined."""
        buffer = self._buffers.get(chunk.dtype)
        if buffer is None or len(buffer) < chunk.numel():
            buffer = self._buffers[chunk.dtype] = torch.empty(max(_CHUNK, chunk.numel()), dtype=chunk.dtype)
        return buffer[: chunk.numel()].view(chunk.shape)


def chunks(values: Tensor) -> Sequence[Tensor]:
    """Return views of CPU values so small that what is computed of them stays in the cache; else the values."""
    if values.numel() <= _CHUNK or not values.is_contiguous():
        return (values,)
    return values.view(-1).split(_CHUNK)


def summed(counts: Sequence[Tensor]) -> Tensor:
    """Return the sum of 0-dim tensors that may lie on several devices."""
    device = home(counts)
    return torch.stack([moved(count, device) for count in counts]).sum()


@torch.no_grad()
def on_values_(tensor: Tensor, change_: Callable[[Tensor], None]) -> None:
    """Let `change_` work in place on the values that a tensor holds here: its local shard, its explicit entries."""
    if tensor.is_sparse:
        whole = tensor.coalesce()
        change_(whole.values())
        if not tensor.is_coalesced():
            tensor.copy_(whole)
        return
    change_(writable(local_part(tensor)))


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of the tensor that lies on this rank, sharing its storage.

    Raises:
        GradwatchError: ranks hold addends of the tensor (a `Partial` placement): nothing can be said of its elements.
    """
    sharded = as_dtensor(tensor)
    if sharded is None:
        return local_of(tensor)
    if any(placement.is_partial() for placement in sharded.placements):
        raise GradwatchError(
            f"A gradient of shape {tuple(sharded.shape)} is not summed over ranks yet ({sharded.placements}): "
            "treat gradients after their reduction, or leave this parameter out with `paths`."
        )
    with torch.no_grad():
        return sharded.to_local()


def as_dtensor(tensor: Tensor) -> Any:
    """Return the tensor itself where it is a DTensor, else None; does not import what nobody has imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None
