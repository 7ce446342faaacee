"""Whether the units of a layer were ever told apart."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..torchside import home, local_of, moved, whole_of, wide_dtype
from ._shards import put_together

__all__ = ["row_spread"]

_ROOM = 1 << 19
"""Elements that are stacked, so that small weights of one shape need few kernels."""


@torch.no_grad()
def row_spread(tensors: Sequence[Tensor]) -> Tensor:
    """Return how far the rows of each weight differ: 0 where all units were given the same weights.

    The largest over columns of (maximum minus minimum over rows), relative to the largest magnitude in the tensor. Rows
    are the first dimension. A sharded tensor is gathered, one at a time: for the first step, not for every one. Of
    pieces of flat parameters the extremes of each column travel, in one MAX.

    Returns:
        float64, shape (n,): in [0, 2]; 0 for a weight of zeros or of a single row, nan for fewer than two dimensions,
        for an empty tensor, for a sparse or nested one, and where the tensor holds nan.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    device = home(tensors)
    groups = _alike(tensors)
    found = [_spreads([tensors[p] for p in positions]) for positions in groups]
    return put_together([moved(spreads, device, wide_dtype(device)) for spreads in found], groups, device)


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return positions of small weights of one shape, which are looked at together, and of each other tensor alone."""
    groups: list[list[int]] = []
    latest: dict[object, list[int]] = {}
    for position, tensor in enumerate(tensors):
        key = type(tensor), tensor.shape, tensor.dtype, tensor.device
        group = latest.get(key)
        if group is None or not _can_stack(tensor) or (len(group) + 1) * tensor.numel() > _ROOM:
            group = latest[key] = []
            groups.append(group)
        group.append(position)
    return groups


def _can_stack(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and _has_rows(tensor)


def _has_rows(weight: Tensor) -> bool:
    return weight.layout is torch.strided and not weight.is_nested and weight.dim() > 1 and weight.numel() > 0


def _spreads(weights: Sequence[Tensor]) -> Tensor:
    """Return the row spread of each of these, which are of one shape and dtype."""
    if whole_of(weights[0]) is not None:
        return _spread_of_piece(weights[0])
    first = _whole(weights[0])
    wide = wide_dtype(first.device)
    if not _has_rows(first):
        return torch.full((len(weights),), torch.nan, dtype=wide, device=first.device)
    weight = torch.stack(list(weights)) if len(weights) > 1 else first[None]
    if weight.is_complex():
        weight = torch.view_as_real(weight)
    rows = weight.flatten(2) if weight.dtype.itemsize > 1 else weight.float().flatten(2)
    return _relative(rows.amax(dim=1).to(wide), rows.amin(dim=1).to(wide))


def _relative(highest: Tensor, lowest: Tensor) -> Tensor:
    """Return the spread of the rows of weights (n, ...) whose columns have these extremes."""
    largest = torch.maximum(highest.amax(dim=1), -lowest.amin(dim=1))
    return (highest - lowest).amax(dim=1) / torch.where(largest == 0, 1.0, largest)


def _spread_of_piece(piece: Tensor) -> Tensor:
    whole, local = whole_of(piece), local_of(piece)
    assert whole is not None
    wide = wide_dtype(local.device)
    numel = math.prod(whole.shape)
    if len(whole.shape) < 2 or not numel or local.is_complex():
        return torch.full((1,), torch.nan, dtype=wide, device=local.device)
    # Along the columns: an element's place in its row, in the order in which the row lies in memory.
    elements = torch.arange(whole.start, whole.start + len(local), device=local.device)
    columns = torch.zeros_like(elements)
    for axis in range(1, len(whole.shape)):
        columns = columns * whole.shape[axis] + whole.places(elements, axis)
    both = torch.full((2, numel // whole.shape[0]), -torch.inf, dtype=wide, device=local.device)
    values = local.to(wide)
    both[0].scatter_reduce_(0, columns, values, "amax")
    both[1].scatter_reduce_(0, columns, -values, "amax")
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=whole.group)
    return _relative(both[:1], -both[1:])


def _whole(tensor: Any) -> Tensor:
    dtensor = sys.modules.get("torch.distributed.tensor")
    return tensor.full_tensor() if dtensor is not None and isinstance(tensor, dtensor.DTensor) else tensor
