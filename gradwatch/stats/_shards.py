"""What part of a gradient lies on this rank, and the fewest collectives that put the parts together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..torchside import (
    Piece,
    StandIn,
    can_lend,
    can_lend_all,
    dense,
    local_of,
    moved,
    pipeline_of,
    sent,
    values,
    whole_of,
    wide_dtype,
    world_size,
)

__all__ = [
    "Shards",
    "alike",
    "index_on",
    "is_whole",
    "put_together",
    "reduce_max_",
    "reduce_sum_",
]

_USUAL = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_DEVICE, _DTYPE, _IS_CPU = attrgetter("device"), attrgetter("dtype"), attrgetter("is_cpu")


class Shards:
    """The pieces of a list of tensors that lie on this rank.

    A DTensor is split over some dimensions of its mesh and repeated over the others. Sums over pieces need one SUM
    all-reduce per process group, however many tensors are split over it; repeated ones are not counted twice. The same
    holds for pieces of FSDP1's flat parameters. Of a pipeline's stages every rank holds some tensors whole (or pieces
    of them, whose sums come first) and nothing of the others.

    Args:
        tensors: plain tensors, sparse ones, DTensors and pieces in any order, the same list on every rank. A DTensor
            with a pending sum (`Partial`) is reduced first, which costs a collective of its own.
        of: the parameters that they belong to, which know whether they are a pipeline's; None: of nobody's.

    Attributes:
        locals: contiguous, real pieces in the order given, of any shape; some may be empty. They share memory with the
            tensors where that is possible (not for fp8, nor for those with gaps or repetitions).
        unstored: position -> how many elements of a sparse tensor are zero and not among its piece.
        groups: process group name -> (group, positions of the tensors split over it).
        mesh_sizes: how many ranks the tensors' meshes have.
        absent: positions of pieces of gradients that are not there; None where every rank knows by itself what is.
    """

    __slots__ = ("absent", "groups", "locals", "mesh_sizes", "unstored")

    def __init__(self, tensors: Sequence[Tensor], of: Sequence[Tensor] | None = None) -> None:
        self.groups: dict[str, tuple[Any, list[int]]] = {}
        self.mesh_sizes: set[int] = set()
        self.unstored: dict[int, int] = {}
        self.absent: list[int] | None = None
        self._take(tensors)
        pipeline = None if of is None else pipeline_of(of)
        if pipeline is not None and pipeline.num_ranks > 1:
            self._note_stages(pipeline.group, len(tensors))

    def _note_stages(self, group: Any, count: int) -> None:
        """Let the sums of all tensors go over the stages, after those of pieces inside a stage."""
        self.groups.pop(group.group_name, None)
        if not self.groups:
            self.mesh_sizes = {dist.get_world_size()}
        self.groups[group.group_name] = (group, list(range(count)))

    def _take(self, tensors: Sequence[Tensor]) -> None:
        dtensor = sys.modules.get("torch.distributed.tensor")
        kinds = set(map(type, tensors))
        if _USUAL.issuperset(map(_DTYPE, tensors)) and can_lend_all(tensors):
            self.locals = list(tensors)
            return
        split = (Piece, StandIn) if dtensor is None else (Piece, StandIn, dtensor.DTensor)
        if not any(issubclass(kind, split) for kind in kinds):
            self.locals = [self._dense(position, tensor) for position, tensor in enumerate(tensors)]
            return
        self.locals = []
        cuts: dict[Any, Sequence[Any]] = {}
        for position, tensor in enumerate(tensors):
            if isinstance(tensor, (Piece, StandIn)):
                piece = self._note_piece(position, tensor)
            else:
                piece = self._note(position, tensor, dtensor, cuts) if isinstance(tensor, split) else tensor
            self.locals.append(self._dense(position, piece))

    def _note_piece(self, position: int, tensor: Tensor) -> Tensor:
        whole = whole_of(tensor)
        if whole is not None:
            self.mesh_sizes.add(whole.num_holders)
            self.groups.setdefault(whole.group.group_name, (whole.group, []))[1].append(position)
        if isinstance(tensor, Piece):
            self.absent = [] if self.absent is None else self.absent
            if tensor.is_absent:
                self.absent.append(position)
        return local_of(tensor)

    def _dense(self, position: int, tensor: Tensor) -> Tensor:
        if tensor.dtype in _USUAL and can_lend(tensor):
            return tensor
        piece, zeros = values(tensor)
        if zeros:
            self.unstored[position] = zeros
        return dense(piece)

    def add_unstored_(self, counts: Tensor) -> Tensor:
        """Add the zeros that sparse tensors do not store to the first column of `counts` (n, k), in place."""
        for position, zeros in self.unstored.items():
            counts[position, 0] += zeros
        return counts

    def _note(self, position: int, tensor: Any, dtensor: Any, cuts: dict[Any, Sequence[Any]]) -> Tensor:
        """Note what a DTensor is split over, and return its piece.

        Args:
            cuts: groups of the meshes and placements that have been seen: asking for them takes longer than all else.
        """
        mesh, placements = tensor.device_mesh, tensor.placements
        groups = cuts.get((id(mesh), placements))
        if groups is None:
            if any(placement.is_partial() for placement in placements):
                whole = [dtensor.Replicate() if p.is_partial() else p for p in placements]
                return self._note(position, tensor.redistribute(placements=whole), dtensor, cuts)
            groups = cuts[id(mesh), placements] = _groups_of(mesh, placements)
            self.mesh_sizes.add(mesh.size())
        for group, name in groups:
            self.groups.setdefault(name, (group, []))[1].append(position)
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


def _groups_of(mesh: Any, placements: Sequence[Any]) -> list[tuple[Any, str]]:
    # Not `is_shard()`: that is False for the _StridedShard of FSDP2 on top of tensor parallel.
    cut = [dim for dim, p in enumerate(placements) if not p.is_replicate() and mesh.size(dim) > 1]
    groups = [mesh.get_group(dim) for dim in cut]
    return [(group, group.group_name) for group in groups]


def is_whole(tensor: Tensor) -> bool:
    """Return whether all elements of a tensor lie on every rank that holds it."""
    if isinstance(tensor, (Piece, StandIn)):
        return whole_of(tensor) is None
    dtensor = sys.modules.get("torch.distributed.tensor")
    if dtensor is None or not isinstance(tensor, dtensor.DTensor):
        return True
    sizes = tensor.device_mesh.shape
    return all(size == 1 or placement.is_replicate() for size, placement in zip(sizes, tensor.placements, strict=True))


def alike(pieces: Sequence[Tensor]) -> list[list[int]]:
    """Return positions grouped by device and dtype: what one kernel may be given."""
    # Each device that a tensor names is an object made anew: of thousands of tensors that is what costs.
    same = len(set(map(_DTYPE, pieces))) == 1 and (all(map(_IS_CPU, pieces)) or len(set(map(_DEVICE, pieces))) == 1)
    if same:
        return [list(range(len(pieces)))]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for position, piece in enumerate(pieces):
        groups.setdefault((piece.device, piece.dtype), []).append(position)
    return list(groups.values())


def put_together(parts: Sequence[Tensor], groups: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return rows that were computed group by group in the order of their positions, on one device."""
    wide = wide_dtype(device) if parts[0].is_floating_point() else None
    here = [moved(part, device, wide) for part in parts]
    flat = torch.cat(here) if len(here) > 1 else here[0]
    order = [position for group in groups for position in group]
    if order == list(range(len(order))):
        return flat
    places = [0] * len(order)
    for row, position in enumerate(order):
        places[position] = row
    return flat.index_select(0, index_on(places, device))


def index_on(positions: Sequence[int], device: torch.device) -> Tensor:
    """Return int64 positions on a device, without making the host wait for it."""
    return sent(torch.tensor(positions, dtype=torch.int64), device)


def reduce_sum_(flat: Tensor) -> Tensor:
    """Add up over all ranks of the default process group, in place; nothing happens where there is none."""
    if world_size() > 1:
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    return flat


def reduce_max_(flat: Tensor) -> Tensor:
    """Take the maximum over all ranks of the default process group, in place; nothing happens where there is none."""
    if world_size() > 1:
        dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    return flat
