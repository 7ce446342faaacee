"""Multiply many gradients in place, in few kernels, without reading the device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..torchside import is_host, local_of, moved, writable
from ._shards import alike

__all__ = ["scale_", "times", "times_"]

_HALVES = (torch.float16, torch.bfloat16)


@torch.no_grad()
def scale_(tensors: Sequence[Tensor], coefficient: float | Tensor) -> None:
    """Multiply tensors in place by one coefficient, or by one each.

    A coefficient of exactly 1 that is known on the host (a number, a CPU tensor) costs nothing. None is rounded to a
    tensor's dtype first, where it would be 0: 6e4 in float16 times 1e-8 is 6e-4.

    Args:
        tensors: plain, sparse and distributed tensors of any dtypes, on any devices.
        coefficient: a number, a 0-dim tensor, or a tensor of shape (n,).

    Raises:
        UnreadableError: a tensor's elements lie on one another (windows, say): it would be multiplied twice there.
    """
    if not tensors:
        return
    pieces = [_storage(t) for t in tensors]
    if isinstance(coefficient, Tensor) and not is_host(coefficient.device):
        _on_device(pieces, coefficient)
        return
    known = torch.as_tensor(coefficient, dtype=torch.float64)
    each: list[float] = known.expand(len(pieces)).tolist()
    changed = [position for position, factor in enumerate(each) if factor != 1]
    for group in alike([pieces[p] for p in changed]):
        members, factors = [pieces[changed[i]] for i in group], [each[changed[i]] for i in group]
        if members[0].dtype in _HALVES or any(map(_is_lazy, members)):
            # The foreach kernel rounds the factor to the tensors' dtype first: a small one to 0.
            for member, factor in zip(members, factors, strict=True):
                member.mul_(factor)
        elif len(set(factors)) == 1:
            torch._foreach_mul_(members, factors[0])
        else:
            torch._foreach_mul_(members, factors)


def times(tensor: Tensor, factor: Tensor) -> Tensor:
    """Return a tensor times a 0-dim tensor, in the tensor's dtype, as `times_` computes it."""
    if tensor.dtype not in _HALVES:
        return tensor * factor.to(_wide(tensor.dtype))
    return (
        (tensor * factor.to(torch.float32).reshape([1] * max(tensor.dim(), 1))).to(tensor.dtype).reshape(tensor.shape)
    )


@torch.no_grad()
def times_(piece: Tensor, factor: Tensor) -> None:
    """Multiply a plain tensor in place by a 0-dim tensor on its device, which is not rounded to the tensor's dtype.

    `mul_` would: a 0-dim tensor on a device does not promote.
    """
    factor = factor.to(_wide(piece.dtype))
    if piece.dtype not in _HALVES:
        piece.mul_(factor)
    elif piece.numel():
        # With a dimension it promotes, and the product is rounded once.
        piece = piece.view(1) if not piece.dim() else piece
        torch.mul(piece, factor.reshape([1] * piece.dim()), out=piece)


def _on_device(pieces: list[Tensor], coefficient: Tensor) -> None:
    for group in alike(pieces):
        members = [pieces[p] for p in group]
        device, dtype = members[0].device, members[0].dtype
        here = moved(coefficient, device, _wide(dtype))
        if here.dim():
            rows = here.unbind()
            for member, position in zip(members, group, strict=True):
                times_(member, rows[position])
        elif dtype in _HALVES or any(map(_is_lazy, members)):
            for member in members:
                times_(member, here)
        else:
            torch._foreach_mul_(members, here)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype.to_real() if dtype.is_complex else dtype, torch.float32)


def _storage(tensor: Any) -> Tensor:
    """Return a plain tensor that shares memory with all stored values of `tensor`, each of them once."""
    dtensor = sys.modules.get("torch.distributed.tensor")
    if dtensor is not None and isinstance(tensor, dtensor.DTensor):
        tensor = tensor.to_local()
    return writable(local_of(tensor))


def _is_lazy(piece: Tensor) -> bool:
    """Return whether a sign is put off: the foreach kernels do not take such tensors."""
    return piece.is_neg() or (piece.is_complex() and piece.is_conj())
