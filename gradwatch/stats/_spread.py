"""Whether the units of a layer were ever told apart."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._norms import wide_dtype

__all__ = ["row_spread"]


@torch.no_grad()
def row_spread(tensors: Sequence[Tensor]) -> Tensor:
    """Return how far the rows of each weight differ: 0 where all units were given the same weights.

    The largest over columns of (maximum minus minimum over rows), relative to the largest magnitude in the tensor. Rows
    are the first dimension. A sharded tensor is gathered, one at a time: for the first step, not for every one.

    Returns:
        float64, shape (n,): in [0, 2]; 0 for a weight of zeros or of a single row, nan for fewer than two dimensions,
        for an empty tensor and where the tensor holds nan.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack([_spread(_whole(t)) for t in tensors])


def _spread(weight: Tensor) -> Tensor:
    wide = wide_dtype(weight.device)
    if weight.dim() < 2 or not weight.numel():
        return torch.full((), torch.nan, dtype=wide, device=weight.device)
    if weight.is_complex():
        weight = torch.view_as_real(weight)
    rows = weight.flatten(1) if weight.dtype.itemsize > 1 else weight.float().flatten(1)
    spread = (rows.amax(dim=0).to(wide) - rows.amin(dim=0).to(wide)).amax()
    low, high = torch.aminmax(rows)
    largest = torch.maximum(high, -low).to(wide)
    return spread / torch.where(largest == 0, 1.0, largest)


def _whole(tensor: Any) -> Tensor:
    dtensor = sys.modules.get("torch.distributed.tensor")
    return tensor.full_tensor() if dtensor is not None and isinstance(tensor, dtensor.DTensor) else tensor
