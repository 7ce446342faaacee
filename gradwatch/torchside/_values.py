"""What a tensor of any kind holds, as plain tensors: to be read, and to be written to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UnreadableError
from ._memory import can_lend
from ._pieces import Piece

__all__ = ["Values", "declassed", "dense", "overlaps", "owned", "parts", "values", "why_unreadable", "writable"]

_WIDE_ENOUGH = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_CHUNK = 1 << 20
_USUAL = _WIDE_ENOUGH | {torch.complex64, torch.complex128}
_USUAL_LAYOUTS = (torch.strided, torch.sparse_coo)


class Values(NamedTuple):
    """The elements of a tensor.

    Attributes:
        piece: plain, strided, real, floating, of any strides; without a graph. It shares memory where that is possible.
        zeros: how many elements besides are zero and not stored.
    """

    piece: Tensor
    zeros: int = 0


def values(tensor: Tensor) -> Values:
    """Return the elements of a tensor of any kind.

    Sparse tensors give what they store, duplicates added up; complex ones real and imaginary parts in turn; integers
    and floats of fewer than 16 bits come as float32 or float64, quantised ones as what they stand for, nested ones in
    one row. Of a DTensor, the part on this rank is to be given.

    Raises:
        UnreadableError: a tensor of a kind that nothing here can read.
    """
    usual = type(tensor) in _PLAIN and tensor.layout is torch.strided and tensor.dtype in _WIDE_ENOUGH
    if usual and not tensor.is_nested and not tensor.is_neg() and not tensor._is_zerotensor():
        return Values(tensor.detach() if tensor.requires_grad else tensor)
    try:
        return _unusual(tensor.detach())
    except UnreadableError:
        raise
    except Exception as error:
        kind = f"{type(tensor).__name__} of {tensor.dtype}, {tensor.layout}"
        raise UnreadableError(f"a {kind} can't be read: {type(error).__name__}: {str(error)[:200]}") from error


def declassed(tensor: Tensor) -> Tensor:
    """Return a tensor without its graph and without its class, where that class is but a name for plain memory (an
    image, a mask): operations then give plain tensors, and run no code of the user's."""
    if type(tensor) not in _PLAIN and type(tensor).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl:
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.as_subclass(Tensor).detach()
    return tensor.detach()


def _unusual(tensor: Tensor) -> Values:
    zeros = 0
    if tensor.is_nested:
        rows = [row.reshape(-1) for row in tensor.unbind()]
        tensor = torch.cat(rows) if rows else torch.zeros(0)
    elif type(tensor) not in _PLAIN:
        tensor = _plain(tensor)
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        stored = _stored(tensor)
        zeros = tensor.numel() - stored.numel()
        tensor = stored
    if tensor.is_complex():
        tensor, zeros = torch.view_as_real(tensor.resolve_conj()), 2 * zeros
    if tensor._is_zerotensor():
        tensor = tensor.clone()
    tensor = tensor.resolve_neg()
    if tensor.dtype not in _WIDE_ENOUGH:
        short = tensor.is_floating_point() or tensor.dtype.itemsize < 4
        tensor = tensor.to(torch.float32 if short else torch.float64)
    return Values(tensor, zeros)


def _plain(tensor: Tensor) -> Tensor:
    """Return what a subclass holds as a plain tensor."""
    plain = declassed(tensor)
    if type(plain) in _PLAIN:
        return plain
    # A wrapper decides for itself what it holds: a result still in flight arrives, a scaled one is worked out.
    found = tensor.clone()
    if type(found) not in _PLAIN and type(found).dequantize is not Tensor.dequantize:
        found = found.dequantize()
    if type(found) not in _PLAIN:
        raise UnreadableError(f"a {type(tensor).__name__} keeps its elements to itself")
    return found


def _stored(tensor: Tensor) -> Tensor:
    if tensor.layout is torch.sparse_coo:
        return tensor.coalesce().values()
    return tensor.to_dense() if tensor.is_mkldnn else tensor.values()


def dense(piece: Tensor) -> Tensor:
    """Return all elements of a plain strided tensor in a row, in any order, without a copy where that is possible."""
    if piece.is_contiguous():
        return piece
    if _is_permuted(piece):
        # channels_last, transposed: the memory has no holes, and a reduction may read it in any order.
        return piece.as_strided((piece.numel(),), (1,))
    return piece.contiguous()


def _is_permuted(piece: Tensor) -> bool:
    pairs = sorted((stride, size) for stride, size in zip(piece.stride(), piece.shape, strict=True) if size > 1)
    expected = 1
    for stride, size in pairs:
        if stride != expected:
            return False
        expected *= size
    return True


def parts(piece: Tensor) -> tuple[Iterator[Tensor], int]:
    """Return the elements of a plain strided tensor as dense pieces, and how often each of them counts.

    Nothing as large as the tensor is made: an expanded one is read once, one with gaps in copies of 4 MiB.
    """
    if can_lend(piece):
        return iter((piece,)), 1
    once = _once(piece)
    times = piece.numel() // max(once.numel(), 1)
    if once.is_contiguous() or _is_permuted(once):
        return iter((dense(once),)), times
    return (chunk.contiguous() for chunk in _chunks(once)), times


def _chunks(piece: Tensor) -> Iterator[Tensor]:
    if piece.numel() <= _CHUNK:
        yield piece
        return
    # The longest dimension: a piece of more elements than a chunk has one that can be split.
    dim = max(range(piece.dim()), key=lambda d: piece.shape[d])
    for half in piece.split(-(-piece.shape[dim] // 2), dim=dim):
        yield from _chunks(half)


def _once(tensor: Tensor) -> Tensor:
    """Return a view that holds an element once where the tensor repeats it along a dimension."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def overlaps(tensor: Tensor) -> bool:
    """Return whether two elements of a plain strided tensor may lie at one place in memory."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def writable(tensor: Tensor) -> Tensor:
    """Return a plain tensor that shares memory with all that a tensor stores, and holds each element once: what
    changes each element by itself may change it in place.

    Raises:
        UnreadableError: its elements lie on one another in a way that no view can undo.
    """
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    if tensor.is_nested or tensor.is_contiguous():
        return tensor
    tensor = _once(tensor)
    if overlaps(tensor):
        raise UnreadableError("a tensor whose elements lie on one another can't be changed in place: clone it first")
    return tensor


def owned(tensor: Tensor) -> Tensor:
    """Return the tensor itself where arithmetic in place on it is right, else a copy with memory of its own."""
    if type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_nested:
        if overlaps(tensor) or tensor.is_inference() or tensor._is_zerotensor():
            return tensor.detach().clone(memory_format=torch.contiguous_format)
    elif tensor.layout is torch.sparse_coo and overlaps(tensor._values()):
        return tensor.detach().coalesce().clone()
    return tensor


def why_unreadable(tensor: Tensor) -> str:
    """Return why a tensor can't be read; empty where it can."""
    kind = type(tensor)
    if kind is Tensor and tensor.layout in _USUAL_LAYOUTS and tensor.dtype in _USUAL and not tensor.is_nested:
        return ""
    dtensor = sys.modules.get("torch.distributed.tensor")
    if isinstance(tensor, Piece) or (dtensor is not None and isinstance(tensor, dtensor.DTensor)):
        return ""
    try:
        with torch.no_grad():
            values(tensor)
    except UnreadableError as error:
        return str(error)
    return ""
