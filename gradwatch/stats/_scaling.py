"""Multiply many gradients in place, in few kernels, without reading the device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["scale_"]


@torch.no_grad()
def scale_(tensors: Sequence[Tensor], coefficient: float | Tensor) -> None:
    """Multiply tensors in place by one coefficient, or by one each.

    A coefficient of exactly 1 that is known on the host (a number, a CPU tensor) costs nothing.

    Args:
        tensors: plain, sparse and distributed tensors of any dtypes.
        coefficient: a number, a 0-dim tensor, or a tensor of shape (n,).
    """
    if not tensors:
        return
    pieces = [_storage(t) for t in tensors]
    if isinstance(coefficient, Tensor) and coefficient.device.type != "cpu":
        _on_device(pieces, coefficient)
        return
    known = torch.as_tensor(coefficient, dtype=torch.float64)
    each: list[float] = known.expand(len(pieces)).tolist()
    groups: dict[tuple[Any, ...], tuple[list[Tensor], list[float]]] = {}
    for piece, factor in zip(pieces, each, strict=True):
        if factor != 1:
            members, factors = groups.setdefault((piece.device, piece.dtype), ([], []))
            members.append(piece)
            factors.append(factor)
    for (_, dtype), (members, factors) in groups.items():
        if dtype in (torch.float16, torch.bfloat16):
            # The foreach kernel rounds the factor to the tensors' dtype first: a small one to 0.
            for member, factor in zip(members, factors, strict=True):
                member.mul_(factor)
        elif len(set(factors)) == 1:
            torch._foreach_mul_(members, factors[0])
        else:
            torch._foreach_mul_(members, factors)


def _on_device(pieces: list[Tensor], coefficient: Tensor) -> None:
    if coefficient.dim():
        for piece, factor in zip(pieces, coefficient.unbind(), strict=True):
            piece.mul_(factor.to(piece.device))
        return
    groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for piece in pieces:
        groups.setdefault((piece.device, piece.dtype), []).append(piece)
    for (device, dtype), members in groups.items():
        # float16 would round the coefficient, and a small one to 0.
        wide = torch.promote_types(dtype, torch.float32) if not dtype.is_complex else torch.float32
        torch._foreach_mul_(members, coefficient.to(device, wide))


def _storage(tensor: Any) -> Tensor:
    """Return a plain tensor that shares memory with all stored values of `tensor`."""
    dtensor = sys.modules.get("torch.distributed.tensor")
    if dtensor is not None and isinstance(tensor, dtensor.DTensor):
        tensor = tensor.to_local()
    if tensor.layout is torch.sparse_coo:
        return tensor._values()
    return tensor.values() if tensor.layout is not torch.strided else tensor
