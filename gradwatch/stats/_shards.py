"""What part of a gradient lies on this rank, and the fewest collectives that put the parts together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Shards", "by_dtype", "dense_local", "flat_local", "index_on", "reduce_max_", "reduce_sum_"]

_WIDE_ENOUGH = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Shards:
    """The pieces of a list of tensors that lie on this rank.

    A DTensor is split over some dimensions of its mesh and repeated over the others. Sums over pieces need one SUM
    all-reduce per process group, however many tensors are split over it; repeated ones are not counted twice.

    Args:
        tensors: plain tensors, sparse ones and DTensors in any order, the same list on every rank. A DTensor with a
            pending sum (`Partial`) is reduced first, which costs a collective of its own.

    Attributes:
        locals: contiguous, real pieces in the order given, of any shape; some may be empty. They share memory with the
            tensors where that is possible (not for sparse, fp8 and overlapping ones).
        groups: process group name -> (group, positions of the tensors split over it).
        mesh_sizes: how many ranks the tensors' meshes have.
    """

    __slots__ = ("groups", "locals", "mesh_sizes")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.groups: dict[str, tuple[Any, list[int]]] = {}
        self.mesh_sizes: set[int] = set()
        dtensor = sys.modules.get("torch.distributed.tensor")
        kinds = set(map(type, tensors))
        if dtensor is None or not any(issubclass(kind, dtensor.DTensor) for kind in kinds):
            self.locals = [dense_local(t) for t in tensors]
            return
        self.locals = []
        for position, tensor in enumerate(tensors):
            piece = self._note(position, tensor, dtensor) if isinstance(tensor, dtensor.DTensor) else tensor
            self.locals.append(dense_local(piece))

    def _note(self, position: int, tensor: Any, dtensor: Any) -> Tensor:
        if any(placement.is_partial() for placement in tensor.placements):
            whole = [dtensor.Replicate() if p.is_partial() else p for p in tensor.placements]
            tensor = tensor.redistribute(placements=whole)
        self.mesh_sizes.add(tensor.device_mesh.size())
        for dim, placement in enumerate(tensor.placements):
            # Not `is_shard()`: that is False for the _StridedShard of FSDP2 on top of tensor parallel.
            if not placement.is_replicate() and tensor.device_mesh.size(dim) > 1:
                group = tensor.device_mesh.get_group(dim)
                self.groups.setdefault(group.group_name, (group, []))[1].append(position)
        return tensor.to_local()

    def sum_(self, values: Tensor) -> Tensor:
        """Add up `values` (n, ...) over the ranks that hold other pieces of the same tensors, in place."""
        return self._reduce_(values, dist.ReduceOp.SUM)

    def max_(self, values: Tensor) -> Tensor:
        """Take the largest of `values` (n, ...) over the ranks that hold other pieces, in place."""
        return self._reduce_(values, dist.ReduceOp.MAX)

    def _reduce_(self, values: Tensor, op: Any) -> Tensor:
        for group, positions in self.groups.values():
            if len(positions) == len(values):
                dist.all_reduce(values, op=op, group=group)
                continue
            index = index_on(positions, values.device)
            packed = values.index_select(0, index)
            dist.all_reduce(packed, op=op, group=group)
            values.index_copy_(0, index, packed)
        return values


def dense_local(tensor: Tensor) -> Tensor:
    """Return all elements of a plain tensor contiguously, in any order, without a copy wherever that is possible.

    Sparse tensors give the values that are stored, duplicates added up; complex ones real and imaginary parts in turn;
    8-bit floats come as float32.
    """
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()
    if tensor.dtype not in _WIDE_ENOUGH:
        tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.float()
    if tensor.is_contiguous():
        return tensor
    # channels_last, transposed: the memory has no holes, and a reduction may read it in any order.
    pairs = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    expected = 1
    for stride, size in pairs:
        if stride != expected:
            return tensor.reshape(-1)
        expected *= size
    return tensor.as_strided((tensor.numel(),), (1,))


def flat_local(tensor: Tensor) -> Tensor:
    """Return what `dense_local` does, in one row."""
    return dense_local(tensor).view(-1)


def by_dtype(pieces: Sequence[Tensor]) -> list[list[int]]:
    """Return positions grouped by dtype."""
    groups: dict[torch.dtype, list[int]] = {}
    for position, piece in enumerate(pieces):
        groups.setdefault(piece.dtype, []).append(position)
    return list(groups.values())


def index_on(positions: Sequence[int], device: torch.device) -> Tensor:
    """Return int64 positions on a device, without making the host wait for it."""
    index = torch.tensor(positions, dtype=torch.int64)
    if device.type == "cuda":
        return index.pin_memory().to(device, non_blocking=True)
    return index.to(device)


def _has_peers() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def reduce_sum_(flat: Tensor) -> Tensor:
    """Add up over all ranks of the default process group, in place; nothing happens where there is none."""
    if _has_peers():
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    return flat


def reduce_max_(flat: Tensor) -> Tensor:
    """Take the maximum over all ranks of the default process group, in place; nothing happens where there is none."""
    if _has_peers():
        dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    return flat
