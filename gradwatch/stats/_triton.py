"""One read of many CUDA tensors gives sum, sum of squares, zeros, non-finite, absmax and the exponent histogram.

Two launches however many tensors there are: their addresses go to the device in one asynchronous copy, every program
scans one chunk of one tensor, and a second kernel adds up the chunks of each tensor in a fixed order, so that the same
gradients give the same bits on every rank. Imported on first use only: Triton comes with the CUDA builds of torch.

Most cards do one float64 operation in the time of 32 or 64 float32 ones: there gradients of up to 32 bits are added up
in float32 within a lane of a chunk (16 values), and in float64 from there on. What is lost in an addition is kept and
added to the next (W. Kahan, "Further remarks on reducing truncation errors", CACM 1965). Squares leave float32 where
values do not: large, middling and small ones are added up apart, each scaled by a power of two (J. L. Blue, "A portable
Fortran program to find the Euclidean norm of a vector", TOMS 1978).
"""

# ruff: noqa: ANN001, ANN202, PLR0124, PLR0913, PLR0915, PLR0917, SIM108, SIM300
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
_FAST_FLOAT64 = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)})
"""Compute capabilities: P100, V100, A100, H100 and B200."""
_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}


# Squares of what lies between, and sums of sixteen of them, are far from both ends of float32, and so are those of the
# others once they are scaled.
_HIGH, _LOW = tl.constexpr(2.0**50), tl.constexpr(2.0**-50)
_DOWN, _UP = tl.constexpr(2.0**-78), tl.constexpr(2.0**100)
_OF_DOWN, _OF_UP = tl.constexpr(2.0**78), tl.constexpr(2.0**-100)


@triton.jit
def _add(total, lost, values):  # type: ignore[no-untyped-def]
    """Add to lanes, with what was lost before; return the sum and what is lost now."""
    due = values - lost
    now = total + due
    lost = (now - total) - due
    # Beyond the largest number nothing is lost: the difference would be none.
    return now, tl.where(tl.abs(now) == float("inf"), 0.0, lost)


@triton.jit
def _in_float64(total, lost):  # type: ignore[no-untyped-def]
    return total.to(tl.float64) - lost.to(tl.float64)


@triton.jit
def _scan_kernel(  # type: ignore[no-untyped-def]
    pointers,
    numels,
    chunk_tensor,
    chunk_start,
    partials,
    counts,
    TYPE: tl.constexpr,
    WIDE: tl.constexpr,
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
    nothing = tl.zeros([BLOCK], WIDE)
    # Of values and of their squares, each with what was lost: middling, large and small ones.
    total, square, total_lost, square_lost = nothing, nothing, nothing, nothing
    large, large_square, large_lost, large_square_lost = nothing, nothing, nothing, nothing
    small, small_square, small_lost, small_square_lost = nothing, nothing, nothing, nothing
    most = nothing
    zeros = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    table = tl.zeros([512], tl.int32)
    for step in range(STEPS):
        offsets = start + step * BLOCK + lanes
        inside = offsets < numel
        values = tl.load(pointer + offsets, mask=inside, other=0.0)
        wide = values.to(WIDE)
        magnitude = tl.abs(wide)
        is_nan = wide != wide
        if WIDE == tl.float64:
            total += wide
            square += wide * wide
        elif TYPE == tl.float16:
            total, total_lost = _add(total, total_lost, wide)
            square, square_lost = _add(square, square_lost, wide * wide)
        else:
            is_large = magnitude >= _HIGH
            is_small = magnitude < _LOW
            middling = tl.where(is_large | is_small, 0.0, wide)
            total, total_lost = _add(total, total_lost, middling)
            square, square_lost = _add(square, square_lost, middling * middling)
            scaled = tl.where(is_large, wide * _DOWN, 0.0)
            large, large_lost = _add(large, large_lost, scaled)
            large_square, large_square_lost = _add(large_square, large_square_lost, scaled * scaled)
            scaled = tl.where(is_small, wide * _UP, 0.0)
            small, small_lost = _add(small, small_lost, scaled)
            small_square, small_square_lost = _add(small_square, small_square_lost, scaled * scaled)
        most = tl.maximum(most, tl.where(is_nan, 0.0, magnitude))
        zeros += ((wide == 0.0) & inside).to(tl.int32)
        bad += (is_nan | (magnitude == float("inf"))).to(tl.int32)
        if HISTOGRAM:
            codes = (values.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0x1FF
            table += tl.histogram(codes, 512)
    sums = _in_float64(total, total_lost)
    squares = _in_float64(square, square_lost)
    if (WIDE == tl.float32) and (TYPE != tl.float16):
        sums += _in_float64(large, large_lost) * _OF_DOWN + _in_float64(small, small_lost) * _OF_UP
        squares += _in_float64(large_square, large_square_lost) * (_OF_DOWN * _OF_DOWN)
        squares += _in_float64(small_square, small_square_lost) * (_OF_UP * _OF_UP)
    row = partials + program * 5
    tl.store(row, tl.sum(sums, axis=0))
    tl.store(row + 1, tl.sum(squares, axis=0))
    tl.store(row + 2, tl.sum(zeros, axis=0).to(tl.float64))
    tl.store(row + 3, tl.sum(bad, axis=0).to(tl.float64))
    tl.store(row + 4, tl.max(most, axis=0).to(tl.float64))
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
    wide = tl.float64 if dtype == torch.float64 or _adds_in_float64(device) else tl.float32
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
                WIDE=wide,
                SINGLE=single,
                ALIGNED=all(address % 16 == 0 for address in addresses),
                HISTOGRAM=histograms,
                BLOCK=_BLOCK,
                STEPS=_STEPS,
                num_warps=4 if wide == tl.float64 else 8,
            )
        _finish_kernel[(len(pieces),)](partials, layout.firsts, out, BLOCK=256, num_warps=4)
    return out, counts


@lru_cache(maxsize=64)
def _adds_in_float64(device: torch.device) -> bool:
    """Return whether float64 is but twice the price of float32: there reading is what takes the time, and fewer numbers
    to keep let more of it go on at once."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in _FAST_FLOAT64


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device, without making the host wait for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()
