"""The bits that tensors of any kind store: summed up, copied, compared and put back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..errors import UnreadableError
from ._aside import Aside
from ._devices import is_host
from ._values import declassed

__all__ = ["as_integers", "checksum", "checksums", "differ", "num_bytes", "pieces", "put_bits"]

_CHUNK = 1 << 15
"""Words of eight bytes that are summed at once: what they are multiplied with stays in a processor's cache."""
_BLOCK = 64
"""Chunks that a device sums at once, where each kernel has its price."""
_FACTOR, _OF_UPPER = 6364136223846793005, 1442695040888963407


def pieces(tensor: Tensor) -> list[Tensor]:
    """Return the plain strided tensors that hold all that a tensor stores, sharing its memory.

    Of a DTensor that is this rank's part; of one that stores codes and scales, these. Nothing of one without data.

    Raises:
        UnreadableError: a tensor that keeps its elements to itself.
    """
    if tensor.is_meta:
        return []
    if type(tensor) is not Tensor and hasattr(tensor, "__tensor_flatten__"):
        # Not of a detached one: some make part of what they hold anew.
        names, _ = tensor.__tensor_flatten__()
        inner = [getattr(tensor, name) for name in names]
        return [piece for one in inner if isinstance(one, Tensor) for piece in pieces(one)]
    tensor = declassed(tensor)
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise UnreadableError(f"a {type(tensor).__name__} keeps its elements to itself")
    if tensor.is_nested:
        return [tensor.values()]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout is not torch.strided:
        raise UnreadableError(f"a tensor of layout {tensor.layout} can't be read bit by bit")
    return [tensor.int_repr()] if tensor.is_quantized else [tensor]


def num_bytes(piece: Tensor) -> int:
    return piece.numel() * piece.element_size()


def checksum(piece: Tensor) -> Tensor:
    """Return a sum over the bits of a plain strided tensor, int64, 0-dim, on its device: without a host read.

    One bit that differs always shows. More of them show but for one case in some billion: each word of eight bytes, and
    its upper half once more, is multiplied with an odd number of its own, and all are added modulo 2^64. (The upper
    bit of a word alone would count modulo 2: half of the signs of a tensor could be turned unseen.)
    """
    words = _words(piece)
    weights = _weights(piece.device)
    total = torch.full((), piece.numel(), dtype=torch.int64, device=piece.device)
    upper = torch.empty(min(max(map(len, words), default=0), _CHUNK), dtype=torch.int64, device=piece.device)
    for row in words:
        if not is_host(piece.device) and len(row) >= 2 * _CHUNK:
            whole = len(row) // _CHUNK * _CHUNK
            total, row = _of_blocks(total, row[:whole].view(-1, _CHUNK), weights), row[whole:]
        for part in row.split(_CHUNK) if len(row) else ():  # nothing is split into one part, which is empty
            half, these = upper[: len(part)], weights[: len(part)]
            torch.bitwise_right_shift(part, 33, out=half)
            # Multiplied before the next part is added: parts that change places show.
            total = total * _FACTOR + _dot(part, these) + _dot(half, these) * _OF_UPPER
    return total


def _of_blocks(total: Tensor, parts: Tensor, weights: Tensor) -> Tensor:
    """Return the sum with more parts added to it, shape (n, `_CHUNK`): as one after another, in fewer kernels."""
    for block in parts.split(_BLOCK):
        dots = (block * weights).sum(1) + ((block >> 33) * weights).sum(1) * _OF_UPPER
        powers = _powers(total.device)[-len(dots) :]
        total = total * powers[0] * _FACTOR + (dots * powers).sum()
    return total


def _dot(words: Tensor, weights: Tensor) -> Tensor:
    if is_host(words.device):
        return torch.dot(words, weights)
    return (words * weights).sum()  # other devices have no product of rows for integers


def checksums(given: Sequence[Tensor]) -> list[int]:
    """Return the checksums of plain tensors; one host read for each device that they lie on."""
    by_device: dict[torch.device, list[int]] = {}
    for i, piece in enumerate(given):
        by_device.setdefault(piece.device, []).append(i)
    found = [0] * len(given)
    with Aside():
        for places in by_device.values():
            sums = torch.stack([checksum(given[i]) for i in places]).tolist()  # the host read
            for i, one in zip(places, sums, strict=True):
                found[i] = int(one)
    return found


def differ(copies: Sequence[Tensor], now: Sequence[Tensor]) -> list[bool]:
    """Return which plain tensors hold other bits than their copies; one host read for each device."""
    by_device: dict[torch.device, list[int]] = {}
    for i, piece in enumerate(now):
        by_device.setdefault(piece.device, []).append(i)
    found = [False] * len(now)
    with Aside():
        for device, places in by_device.items():
            pairs = [(copies[i], now[i]) for i in places]
            if is_host(device):
                flags = [not _equal(a, b) for a, b in pairs]
            else:
                flags = torch.stack([_unlike(a, b) for a, b in pairs]).tolist()  # the host read
            for i, flag in zip(places, flags, strict=True):
                found[i] = bool(flag)
    return found


def put_bits(piece: Tensor, copy: Tensor) -> None:
    """Write a copy's bits to where they were copied from."""
    with Aside():
        piece.copy_(copy)


def as_integers(piece: Tensor) -> Tensor:
    """Return the elements as integers of the same bits, in any order that is the same for equal strides."""
    if piece.dtype is torch.bool:
        return piece.view(torch.uint8)
    if piece.is_complex():
        piece = torch.view_as_real(piece.resolve_conj())
    piece = piece.resolve_neg()
    return piece.view(_INTEGERS[piece.element_size()])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(as_integers(a), as_integers(b))


def _unlike(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        return torch.ones((), dtype=torch.bool, device=b.device)
    return (as_integers(a) != as_integers(b)).any()


def _words(piece: Tensor) -> list[Tensor]:
    """Return a tensor's bits as rows of int64: eight bytes each, those left over one by one."""
    flat = as_integers(piece).reshape(-1)
    per_word = 8 // flat.element_size()
    whole = len(flat) // per_word * per_word
    body, rest = flat[:whole], flat[whole:]
    if body.storage_offset() % per_word:
        body = body.clone()
    return [*([body.view(torch.int64)] if whole else []), *([rest.to(torch.int64)] if len(rest) else [])]


@cache
def _powers(device: torch.device) -> Tensor:
    """Return the factor to the powers `_BLOCK` - 1 down to 0, on a device."""
    found = torch.ones(_BLOCK, dtype=torch.int64)
    for i in range(_BLOCK - 2, -1, -1):
        found[i] = found[i + 1] * _FACTOR
    return found.to(device)


@cache
def _weights(device: torch.device) -> Tensor:
    """Return odd numbers drawn once and for all, on a device."""
    generator = torch.Generator().manual_seed(0x5EED)
    drawn = torch.randint(-(2**62), 2**62, (_CHUNK,), generator=generator, dtype=torch.int64)
    return (drawn * 2 + 1).to(device)
