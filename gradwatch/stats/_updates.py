"""How far the optimizer moves each parameter, for any optimizer: measured before and after its step."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..torchside import can_lend_all, home, is_host, largest_piece, lend, pipeline_of, whole_of, wide_dtype
from ._native import native
from ._norms import tensor_norms
from ._shards import Shards, alike

__all__ = ["UpdateMeter", "UpdateStats"]

_ALIGN = 64
_WORTH_NATIVE = 1 << 18


@dataclass(frozen=True, eq=False)
class UpdateStats:
    """Updates of some parameters, on their device.

    Attributes:
        positions: which parameters were measured.
        update_norms: norm of (parameter after the step - before), float64, shape (len(positions),); -1 for all where
            some rank had nothing to say.
        param_norms: norm of the parameter before the step, float64, the same shape.
    """

    positions: list[int]
    update_norms: Tensor
    param_norms: Tensor


class UpdateMeter:
    """Measures updates through copies of parameters, within a bound on memory.

    Where the copies of all parameters don't fit, each `before` takes the next ones that do, in turns. A parameter that
    is larger than the bound by itself is never measured and is listed in `left_out`.

    Norms of parameters in pieces cost one SUM all-reduce per mesh dimension in `after`. Every rank must take part,
    also one that did not step, or whose copies failed: its `before(blank=True)` says so, a failure does by itself.

    Args:
        params: parameters, plain or distributed; for the bound count the largest local pieces, so that all ranks take
            the same turns.
        memory_limit_bytes: of all copies together.

    Attributes:
        left_out: positions of parameters that can't be measured within the bound. Those of a kind that can't be copied
            and subtracted (nested, sparse, 8 bits) are not measured either.
        in_pieces: whether any parameter is split over ranks.

    Raises:
        ConfigError: the bound is negative.
    """

    def __init__(self, params: Sequence[Tensor], memory_limit_bytes: int) -> None:
        if not memory_limit_bytes >= 0:
            raise ConfigError(f"`memory_limit_bytes` must be at least 0. Got {memory_limit_bytes}.")
        self._params = list(params)
        self._limit = memory_limit_bytes
        self._next = 0
        self._chosen: list[int] = []
        self._copies: list[Tensor] | None = []
        self._cut: list[Tensor] = []
        self._arenas: dict[torch.device, Tensor] = {}
        self.in_pieces = pipeline_of(self._params) is not None or any(map(_is_split, self._params))
        self._bytes = list(map(_bytes, self._params))
        self.left_out = [i for i, need in enumerate(self._bytes) if need > memory_limit_bytes]
        self._never = {i for i, param in enumerate(self._params) if not _has_copies(param)}.union(self.left_out)

    @property
    def held_bytes(self) -> int:
        """Memory held for copies now, also between steps."""
        return sum(arena.numel() for arena in self._arenas.values())

    @torch.no_grad()
    def before(self, *, blank: bool = False) -> None:
        """Copy the parameters whose turn it is. Call it right before the optimizer's step.

        Args:
            blank: take part in `after`, with nothing to say; no rank then learns these updates.
        """
        self._chosen, self._copies = self._choose(), None
        if blank:
            return
        pieces = [_local(self._params[i]) for i in self._chosen]
        copies = self._room_for(pieces)
        for into, sources in _grouped(copies, pieces):
            _copy_(into, sources)
        self._copies = copies

    @torch.no_grad()
    def after(self) -> UpdateStats:
        """Return how far those parameters moved. Call it right after the optimizer's step.

        Raises:
            RuntimeError: `before` was not called.
        """
        if not self._chosen and len(self._never) < len(self._params):
            raise RuntimeError("`UpdateMeter.after` needs a call of `before` first.")
        chosen, params = self._chosen, [self._params[i] for i in self._chosen]
        found: tuple[Tensor, Tensor] | None = None
        try:
            if self._copies is not None:
                found = _moved(self._copies, list(map(_local, params)))
        finally:
            # Also where that failed: the other ranks wait.
            self.discard()
            if found is None or self.in_pieces:
                whole = self._whole(params, None if found is None else torch.stack(found, dim=1))
                found = whole[:, 0], whole[:, 1]
        return UpdateStats(chosen, *found)

    def _whole(self, params: list[Tensor], norms: Tensor | None) -> Tensor:
        """Put the pieces' norms together; -1 for all, on all ranks, where any rank has none."""
        if norms is None:
            device = home(self._params)
            squares = torch.full((len(params), 2), -torch.inf, dtype=wide_dtype(device), device=device)
        else:
            squares = norms.square()
        Shards(params, params).sum_(squares)
        return torch.where(torch.isneginf(squares).any(), -1.0, squares.sqrt())

    def discard(self) -> None:
        """Forget the copies: the step did not happen. The memory is kept for the next ones."""
        self._chosen, self._copies = [], []

    def release(self) -> None:
        """Give the memory back."""
        self.discard()
        self._arenas.clear()
        self._cut = []

    def _choose(self) -> list[int]:
        if sum(self._bytes) <= self._limit:
            return [i for i in range(len(self._params)) if i not in self._never]
        chosen: list[int] = []
        room = self._limit
        count = len(self._params)
        for k in range(count):
            i = (self._next + k) % count
            if i in self._never:
                continue
            need = self._bytes[i]
            if need > room:
                self._next = i
                return sorted(chosen)
            room -= need
            chosen.append(i)
        return sorted(chosen)

    def _room_for(self, pieces: list[Tensor]) -> list[Tensor]:
        """Return tensors like the pieces, cut from one block of memory per device that is kept between calls."""
        if len(self._cut) == len(pieces) and all(map(_alike, self._cut, pieces)):
            return self._cut
        need: dict[torch.device, int] = {}
        offsets = []
        for piece in pieces:
            offsets.append(need.get(piece.device, 0))
            need[piece.device] = offsets[-1] + _padded(piece)
        for device, size in need.items():
            if device not in self._arenas or self._arenas[device].numel() < size:
                self._arenas[device] = torch.empty(size, dtype=torch.uint8, device=device)
        self._cut = [
            self._arenas[piece.device][at : at + piece.numel() * piece.element_size()]
            .view(piece.dtype)
            .view(piece.shape)
            for at, piece in zip(offsets, pieces, strict=True)
        ]
        return self._cut


def _copy_(copies: list[Tensor], sources: list[Tensor]) -> None:
    if not is_host(copies[0].device) or torch.get_num_threads() > 1 or not can_lend_all(sources):
        torch._foreach_copy_(copies, sources)
        return
    # The C library's copy passes by the caches: a third less time than torch's.
    dtype, device = copies[0].dtype, copies[0].device
    into = lend(copies, dtype=dtype, device=device, copy=False)
    out_of = lend(sources, dtype=dtype, device=device)
    sizes = (out_of.numels * dtype.itemsize).tolist()
    for target, source, size in zip(into.addresses.tolist(), out_of.addresses.tolist(), sizes, strict=True):
        ctypes.memmove(target, source, size)


def _moved(copies: list[Tensor], params: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return norms of (copy - parameter) and of the copy; the copies may be overwritten."""
    if copies and is_host(copies[0].device) and len(alike(copies)) == 1:
        kernels = native([*copies, *params], worth=_WORTH_NATIVE) if torch.get_num_threads() == 1 else None
        if kernels is not None and copies[0].dtype is not torch.float64:
            update_norms, param_norms = torch.from_numpy(np.sqrt(kernels.moved(copies, params))).unbind(dim=1)
            return update_norms, param_norms
    param_norms = tensor_norms(copies)
    for into, sources in _grouped(copies, params):
        torch._foreach_sub_(into, sources)
    return tensor_norms(copies), param_norms


def _grouped(into: list[Tensor], sources: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    groups: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(into, sources, strict=True):
        if target.numel():
            pair = groups.setdefault((target.device, target.dtype), ([], []))
            pair[0].append(target)
            pair[1].append(source)
    return list(groups.values())


def _local(param: Any) -> Tensor:
    dtensor = sys.modules.get("torch.distributed.tensor")
    if dtensor is not None and isinstance(param, dtensor.DTensor):
        return param.detach().to_local()
    return param.detach()


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype is other.dtype and one.device == other.device


def _padded(piece: Tensor) -> int:
    return -(-piece.numel() * piece.element_size() // _ALIGN) * _ALIGN


def _has_copies(param: Any) -> bool:
    """Return whether a parameter can be copied and subtracted: not a nested, sparse or 8-bit one."""
    local = _local(param)
    wide = (local.is_floating_point() or local.is_complex()) and local.dtype.itemsize > 1
    return wide and local.layout is torch.strided and not local.is_nested


def _is_split(param: Any) -> bool:
    if whole_of(param) is not None:
        return True
    dtensor = sys.modules.get("torch.distributed.tensor")
    if dtensor is None or not isinstance(param, dtensor.DTensor):
        return False
    return any(not p.is_replicate() and param.device_mesh.size(i) > 1 for i, p in enumerate(param.placements))


def _bytes(param: Any) -> int:
    """Return the bytes of a copy of the largest piece on any rank."""
    if not _has_copies(param):
        return 0
    return -(-largest_piece(param) * param.element_size() // _ALIGN) * _ALIGN
