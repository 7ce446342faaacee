"""One read of many CUDA tensors gives sum, sum of squares, zeros, non-finite, absmax and the exponent histogram.

Two launches however many tensors there are: their addresses go to the device in one asynchronous copy, every program
scans one chunk of one tensor, and a second kernel adds up the chunks of each tensor in a fixed order, so that the same
gradients give the same bits on every rank. Imported on first use only: Triton comes with the CUDA builds of torch.
"""

# ruff: noqa: ANN001, ANN202, PLR0124, PLR0913, PLR0917, SIM108
# Kernels are Python in form only: Triton compiles them, and reads no other annotation than constexpr.

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torchside import can_lend, lend

__all__ = ["scan"]

_BLOCK = 1024
_STEPS = 16
_CHUNK = _BLOCK * _STEPS
_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}


@triton.jit
def _scan_kernel(  # type: ignore[no-untyped-def]
    pointers,
    numels,
    chunk_tensor,
    chunk_start,
    partials,
    counts,
    TYPE: tl.constexpr,
    SINGLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    HISTOGRAM: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensor + program)
    start = tl.load(chunk_start + program)
    numel = tl.load(numels + tensor)
    if SINGLE:
        pointer = pointers
    else:
        pointer = tl.load(pointers + tensor).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    start = tl.multiple_of(start, BLOCK)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    most = tl.zeros([BLOCK], tl.float64)
    zeros = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    table = tl.zeros([512], tl.int32)
    for step in range(STEPS):
        offsets = start + step * BLOCK + lanes
        inside = offsets < numel
        values = tl.load(pointer + offsets, mask=inside, other=0.0)
        wide = values.to(tl.float64)
        magnitude = tl.abs(wide)
        is_nan = wide != wide
        total += wide
        square += wide * wide
        most = tl.maximum(most, tl.where(is_nan, 0.0, magnitude))
        zeros += ((wide == 0.0) & inside).to(tl.int32)
        bad += (is_nan | (magnitude == float("inf"))).to(tl.int32)
        if HISTOGRAM:
            codes = (values.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0x1FF
            table += tl.histogram(codes, 512)
    row = partials + program * 5
    tl.store(row, tl.sum(total, axis=0))
    tl.store(row + 1, tl.sum(square, axis=0))
    tl.store(row + 2, tl.sum(zeros, axis=0).to(tl.float64))
    tl.store(row + 3, tl.sum(bad, axis=0).to(tl.float64))
    tl.store(row + 4, tl.max(most, axis=0))
    if HISTOGRAM:
        bins = tl.arange(0, 512)
        # Lanes beyond the end were read as 0.
        beyond = tl.maximum(start + STEPS * BLOCK - numel, 0).to(tl.int32)
        table = tl.where(bins == 0, table - beyond, table)
        tl.atomic_add(counts + tensor.to(tl.int64) * 512 + bins, table.to(tl.int64), mask=table != 0)


@triton.jit
def _finish_kernel(partials, firsts, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tensor = tl.program_id(0)
    first = tl.load(firsts + tensor)
    last = tl.load(firsts + tensor + 1)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    zeros = tl.zeros([BLOCK], tl.float64)
    bad = tl.zeros([BLOCK], tl.float64)
    most = tl.zeros([BLOCK], tl.float64)
    for begin in range(first, last, BLOCK):
        inside = begin + lanes < last
        rows = partials + (begin + lanes) * 5
        total += tl.load(rows, mask=inside, other=0.0)
        square += tl.load(rows + 1, mask=inside, other=0.0)
        zeros += tl.load(rows + 2, mask=inside, other=0.0)
        bad += tl.load(rows + 3, mask=inside, other=0.0)
        most = tl.maximum(most, tl.load(rows + 4, mask=inside, other=0.0))
    row = out + tensor * 5
    tl.store(row, tl.sum(total, axis=0))
    tl.store(row + 1, tl.sum(square, axis=0))
    tl.store(row + 2, tl.sum(zeros, axis=0))
    tl.store(row + 3, tl.sum(bad, axis=0))
    tl.store(row + 4, tl.max(most, axis=0))


class _Layout:
    """Which chunk belongs to which tensor, on the device; kept between steps."""

    def __init__(self, numels: tuple[int, ...], device: torch.device) -> None:
        sizes = torch.tensor(numels, dtype=torch.int64)
        chunks = (sizes + _CHUNK - 1) // _CHUNK
        firsts = torch.cat([torch.zeros(1, dtype=torch.int64), chunks.cumsum(0)])
        tensors = torch.repeat_interleave(torch.arange(len(numels)), chunks)
        self.num_chunks = int(firsts[-1])
        self.firsts = _sent(firsts.to(torch.int32), device)
        self.tensors = _sent(tensors.to(torch.int32), device)
        self.starts = _sent((torch.arange(self.num_chunks) - firsts[tensors]) * _CHUNK, device)
        self.numels = _sent(sizes, device)


_layout = lru_cache(maxsize=256)(_Layout)


def scan(pieces: Sequence[Tensor], *, histograms: bool) -> tuple[Tensor, Tensor | None]:
    """Return moments (n, 5), float64, in the order of `MOMENTS`, and histograms (n, 512), int64, if asked for.

    Args:
        pieces: contiguous tensors of one dtype on one device; some may be empty.
        histograms: count exponents too.
    """
    device, dtype = pieces[0].device, pieces[0].dtype
    layout = _layout(tuple([piece.numel() for piece in pieces]), device)
    partials = torch.empty(max(layout.num_chunks, 1), 5, dtype=torch.float64, device=device)
    out = torch.empty(len(pieces), 5, dtype=torch.float64, device=device)
    counts = torch.zeros(len(pieces), 512, dtype=torch.int64, device=device) if histograms else None
    loan = lend(pieces, dtype=dtype, device=device)
    addresses = loan.addresses.tolist()
    single = len(pieces) == 1 and can_lend(pieces[0])
    pointers = pieces[0].view(-1) if single else _sent(torch.tensor(addresses, dtype=torch.int64), device)
    with _on(device):
        if layout.num_chunks:
            _scan_kernel[(layout.num_chunks,)](
                pointers,
                layout.numels,
                layout.tensors,
                layout.starts,
                partials,
                partials if counts is None else counts,
                TYPE=_TYPES[dtype],
                SINGLE=single,
                ALIGNED=all(address % 16 == 0 for address in addresses),
                HISTOGRAM=histograms,
                BLOCK=_BLOCK,
                STEPS=_STEPS,
                num_warps=4,
            )
        _finish_kernel[(len(pieces),)](partials, layout.firsts, out, BLOCK=256, num_warps=4)
    return out, counts


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device, without making the host wait for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()
