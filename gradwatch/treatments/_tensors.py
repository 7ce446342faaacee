"""In-place arithmetic on tensors of any kind: plain, sharded, sparse."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import GradwatchError
from ..stats._scaling import scale_

__all__ = ["as_dtensor", "local_part", "on_values_", "scale_"]


@torch.no_grad()
def on_values_(tensor: Tensor, change_: Callable[[Tensor], None]) -> None:
    """Let `change_` work in place on the values that a tensor holds here: its local shard, its explicit entries."""
    if tensor.is_sparse:
        whole = tensor.coalesce()
        change_(whole.values())
        if not tensor.is_coalesced():
            tensor.copy_(whole)
        return
    change_(local_part(tensor))


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of the tensor that lies on this rank, sharing its storage.

    Raises:
        GradwatchError: ranks hold addends of the tensor (a `Partial` placement): nothing can be said of its elements.
    """
    sharded = as_dtensor(tensor)
    if sharded is None:
        return tensor
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
