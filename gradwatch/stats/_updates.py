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
from ._native import is_readable, native
from ._norms import tensor_norms
from ._shards import Shards

__all__ = ["UpdateMeter", "UpdateStats"]

_ALIGN = 64
_WORTH_NATIVE = 1 << 18


@dataclass(frozen=True, eq=False)
class UpdateStats:
    """Updates of some parameters, on their device.

    Attributes:
        positions: which parameters were measured.
        update_norms: norm of (parameter after the step - before), float64, shape (len(positions),).
        param_norms: norm of the parameter before the step, float64, the same shape.
    """

    positions: list[int]
    update_norms: Tensor
    param_norms: Tensor


class UpdateMeter:
    """Measures updates through copies of parameters, within a bound on memory.

    Where the copies of all parameters don't fit, each `before` takes the next ones that do, in turns. A parameter that
    is larger than the bound by itself is never measured and is listed in `left_out`.

    Args:
        params: parameters, plain or distributed; local pieces count for the bound.
        memory_limit_bytes: of all copies together.

    Attributes:
        left_out: positions of parameters that can't be measured within the bound.

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
        self._copies: list[Tensor] = []
        self._cut: list[Tensor] = []
        self._arenas: dict[torch.device, Tensor] = {}
        self.left_out = [i for i, p in enumerate(self._params) if _bytes(p) > memory_limit_bytes]

    @property
    def held_bytes(self) -> int:
        """Memory held for copies now, also between steps."""
        return sum(arena.numel() for arena in self._arenas.values())

    @torch.no_grad()
    def before(self) -> None:
        """Copy the parameters whose turn it is. Call it right before the optimizer's step."""
        self._chosen = self._choose()
        pieces = [_local(self._params[i]) for i in self._chosen]
        self._copies = self._room_for(pieces)
        for copies, sources in _grouped(self._copies, pieces):
            _copy_(copies, sources)

    @torch.no_grad()
    def after(self) -> UpdateStats:
        """Return how far those parameters moved. Call it right after the optimizer's step.

        Raises:
            RuntimeError: `before` was not called.
        """
        if not self._chosen and self._params and len(self.left_out) < len(self._params):
            raise RuntimeError("`UpdateMeter.after` needs a call of `before` first.")
        chosen, copies = self._chosen, self._copies
        params = [self._params[i] for i in chosen]
        shards = Shards(params)
        update_norms, param_norms = _moved(copies, [_local(p) for p in params])
        if shards.groups:
            both = torch.stack([update_norms, param_norms], dim=1).square_()
            update_norms, param_norms = shards.sum_(both).sqrt_().unbind(dim=1)
        self.discard()
        return UpdateStats(chosen, update_norms, param_norms)

    def discard(self) -> None:
        """Forget the copies: the step did not happen. The memory is kept for the next ones."""
        self._chosen, self._copies = [], []

    def release(self) -> None:
        """Give the memory back."""
        self.discard()
        self._arenas.clear()
        self._cut = []

    def _choose(self) -> list[int]:
        chosen: list[int] = []
        room, left_out = self._limit, set(self.left_out)
        count = len(self._params)
        for k in range(count):
            i = (self._next + k) % count
            if i in left_out:
                continue
            need = _bytes(self._params[i])
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
    if copies[0].device.type != "cpu" or torch.get_num_threads() > 1 or not all(map(is_readable, sources)):
        torch._foreach_copy_(copies, sources)
        return
    # The C library's copy passes by the caches: a third less time than torch's.
    for copy, source in zip(copies, sources, strict=True):
        ctypes.memmove(copy.data_ptr(), source.data_ptr(), source.numel() * source.element_size())


def _moved(copies: list[Tensor], params: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return norms of (copy - parameter) and of the copy; the copies may be overwritten."""
    if copies and all(t.device.type == "cpu" and t.dtype is copies[0].dtype for t in copies):
        plain = all(param.is_contiguous() for param in params) and torch.get_num_threads() == 1
        kernels = native([*copies, *params], worth=_WORTH_NATIVE) if plain else None
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
            pair[1].append(source.detach())
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


def _bytes(param: Tensor) -> int:
    return _padded(_local(param))
