"""Whether the units of a layer were ever told apart."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..torchside import home, local_of, moved, pipeline_of, whole_of, wide_dtype
from ._shards import put_together

__all__ = ["row_spread"]

_ROOM = 1 << 19
"""Elements that are stacked, so that small weights of one shape need few kernels; or looked at together of a piece."""


@torch.no_grad()
def row_spread(tensors: Sequence[Tensor], *, of: Sequence[Tensor] | None = None) -> Tensor:
    """Return how far the rows of each weight differ: 0 where all units were given the same weights.

    The largest over columns of (maximum minus minimum over rows), relative to the largest magnitude in the tensor. Rows
    are the first dimension. No tensor is gathered: of one in pieces the extremes of each column travel, in one MAX for
    each mesh dimension that cuts rows apart, and two numbers for each that cuts columns. For the first step, not for
    every one.

    Args:
        tensors: weights, plain or distributed.
        of: the parameters that they belong to, where some may be those of a pipeline's other stages.

    Returns:
        float64, shape (n,): in [0, 2]; 0 for a weight of zeros or of a single row, nan for fewer than two dimensions,
        for an empty tensor, for a sparse or nested one, and where the tensor holds nan.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    device = home(tensors)
    groups = _alike(tensors)
    found = [_spreads([tensors[p] for p in positions]) for positions in groups]
    spreads = put_together([moved(part, device, wide_dtype(device)) for part in found], groups, device)
    pipeline = None if of is None else pipeline_of(of)
    if pipeline is not None:
        dist.all_reduce(spreads, group=pipeline.group)
    return spreads


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
    if (sharded := _sharded(weights[0])) is not None:
        return _spread_of_shard(sharded)
    first = weights[0]
    wide = wide_dtype(first.device)
    if not _has_rows(first):
        return torch.full((len(weights),), torch.nan, dtype=wide, device=first.device)
    weight = torch.stack(list(weights)) if len(weights) > 1 else first[None]
    highest, lowest = _extremes(weight)
    return _relative(highest, lowest)


def _extremes(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest and the smallest element of each column of weights (n, rows, ...): wide, (n, columns)."""
    wide = wide_dtype(weights.device)
    if weights.is_complex():
        weights = torch.view_as_real(weights)
    rows = weights.flatten(2) if weights.dtype.itemsize > 1 else weights.float().flatten(2)
    return rows.amax(dim=1).to(wide), rows.amin(dim=1).to(wide)


def _relative(highest: Tensor, lowest: Tensor) -> Tensor:
    """Return the spread of the rows of weights (n, ...) whose columns have these extremes."""
    largest = torch.maximum(highest.amax(dim=1), -lowest.amin(dim=1))
    return (highest - lowest).amax(dim=1) / torch.where(largest == 0, 1.0, largest)


def _sharded(tensor: Any) -> Any:
    """Return a DTensor whose pieces are no addends; None for any other tensor."""
    dtensor = sys.modules.get("torch.distributed.tensor")
    if dtensor is None or not isinstance(tensor, dtensor.DTensor):
        return None
    whole = [dtensor.Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(placements=whole) if whole != list(tensor.placements) else tensor


def _spread_of_shard(sharded: Any) -> Tensor:
    local = sharded.to_local()
    wide = wide_dtype(local.device)
    if len(sharded.shape) < 2 or not sharded.numel():
        return torch.full((1,), torch.nan, dtype=wide, device=local.device)
    # Largest, and largest of the negative: what a piece without rows adds to a maximum is nothing.
    columns = math.prod(local.shape[1:]) * (2 if local.is_complex() else 1)
    both = torch.full((2, columns), -torch.inf, dtype=wide, device=local.device)
    if local.numel():
        highest, lowest = _extremes(local[None])
        both = _comparable(torch.cat([highest, -lowest]))
    for group in _groups(sharded, cuts_rows=True):
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    # Of no column at all here: nothing, too.
    two = torch.zeros(2, dtype=wide, device=local.device)
    if columns:
        two = torch.stack([(both[0] + both[1]).amax(), both.amax()])
    for group in _groups(sharded, cuts_rows=False):
        dist.all_reduce(two, op=dist.ReduceOp.MAX, group=group)
    return (two[0] / torch.where(two[1] == 0, 1.0, two[1]))[None]


def _groups(sharded: Any, *, cuts_rows: bool) -> Iterator[Any]:
    """Yield the process groups of the mesh dimensions that cut rows apart, or columns."""
    for dim, placement in enumerate(sharded.placements):
        axis = getattr(placement, "dim", None)
        if axis is not None and (axis == 0) == cuts_rows and sharded.device_mesh.size(dim) > 1:
            yield sharded.device_mesh.get_group(dim)


def _spread_of_piece(piece: Tensor) -> Tensor:
    whole, local = whole_of(piece), local_of(piece)
    assert whole is not None
    wide = wide_dtype(local.device)
    numel = math.prod(whole.shape)
    if whole.is_apart:
        return torch.zeros(1, dtype=wide, device=local.device)  # the rank that has it says what it is
    if len(whole.shape) < 2 or not numel or local.is_complex():
        return torch.full((1,), torch.nan, dtype=wide, device=local.device)
    both = torch.full((2, numel // whole.shape[0]), -torch.inf, dtype=wide, device=local.device)
    for first in range(0, len(local), _ROOM):
        values = local[first : first + _ROOM].to(wide)
        # Along the columns: an element's place in its row, in the order in which the row lies in memory.
        elements = torch.arange(whole.start + first, whole.start + first + len(values), device=local.device)
        columns = torch.zeros_like(elements)
        for axis in range(1, len(whole.shape)):
            columns = columns * whole.shape[axis] + whole.places(elements, axis)
        both[0].scatter_reduce_(0, columns, values, "amax")
        both[1].scatter_reduce_(0, columns, -values, "amax")
    dist.all_reduce(_comparable(both), op=dist.ReduceOp.MAX, group=whole.group)
    return _relative(both[:1], -both[1:])


def _comparable(extremes: Tensor) -> Tensor:
    """Put inf in the place of nan, which not every backend takes for a maximum: of both the spread is nan."""
    return extremes.masked_fill_(extremes.isnan(), torch.inf)
