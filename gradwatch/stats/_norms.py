"""L2 norms of many tensors in one packed pass: exact to 1e-6 at any size, scale and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._native import native
from ._shards import Shards, by_dtype, index_on

__all__ = ["global_norm", "local_norms", "second_look", "tensor_norms", "wide_dtype"]

# The float32 sum of n squares is off by up to n * 1e-9 where all are equal (1e8 random ones: 1e-2).
_WHOLE = 8192
_ROW = 2048
_TINY = 1024  # fewer elements are squared in float64 faster than one more kernel is called
_HALF_CHUNK = 1 << 16
_WORTH_NATIVE = 1 << 18
_CHUNK = 1 << 20
# Below this root mean square the squares come near float32's smallest normal number and lose digits.
_TINY_RMS = {torch.float32: 1e-16, torch.float64: 1e-145}


@torch.no_grad()
def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of each tensor, whole norms for sharded ones.

    Relative error about 1e-7 of the float64 norm for any size (below 3e-6 even where all elements are equal), from
    1e-40 to 1e38 per element. On the CPU, tensors of
    more than 8,192 elements are read as rows of about 2,048 whose norms are combined in float64; norms that float32
    could not hold are measured again, rescaled. On other devices sums are in float64 and nothing is read back.

    Args:
        tensors: plain, sparse, complex and distributed tensors of any dtypes; all on one kind of device.

    Returns:
        float64, shape (n,), on the tensors' device. nan or inf where a tensor holds one; 0 for an empty one.
        Costs one SUM all-reduce per mesh dimension that DTensors among them are split over.
    """
    shards = Shards(tensors)
    norms = local_norms(shards.locals)
    if not shards.groups:
        return norms
    return shards.sum_(norms.square_()).sqrt_()


def global_norm(norms: Tensor) -> Tensor:
    """Return the L2 norm of all tensors seen as one vector, from their norms; 0-dim, float64. 0 for none."""
    return torch.linalg.vector_norm(norms.to(wide_dtype(norms.device)))


@torch.no_grad()
def second_look(tensors: Sequence[Tensor]) -> Tensor:
    """Return norms as `tensor_norms` does, each rescaled by its largest element first: slower, at any scale.

    For tensors whose squares leave the range of the accumulator: in float32 elements below 1e-19 or above 1e19.
    """
    shards = Shards(tensors)
    if not shards.locals:
        return torch.zeros(0, dtype=torch.float64)
    norms = torch.stack([_rescaled_norm(piece) for piece in shards.locals])
    return shards.sum_(norms.square_()).sqrt_() if shards.groups else norms


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that sums are kept in: float64, or float32 on devices without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def local_norms(pieces: Sequence[Tensor]) -> Tensor:
    """Return norms of contiguous local pieces, float64, shape (n,); pieces of different dtypes may be mixed."""
    if not pieces:
        return torch.zeros(0, dtype=torch.float64)
    first = pieces[0].dtype
    if all(piece.dtype is first for piece in pieces):
        return _norms_of_one_dtype(pieces)
    norms = torch.empty(len(pieces), dtype=wide_dtype(pieces[0].device), device=pieces[0].device)
    for positions in by_dtype(pieces):
        part = _norms_of_one_dtype([pieces[p] for p in positions])
        norms.index_copy_(0, index_on(positions, norms.device), part)
    return norms


def _norms_of_one_dtype(pieces: Sequence[Tensor]) -> Tensor:
    device = pieces[0].device
    if device.type == "cpu":
        return _cpu_norms(pieces)
    wide = wide_dtype(device)
    return torch.stack(torch._foreach_norm(list(pieces), 2, dtype=wide)).to(wide)


def _cpu_norms(pieces: Sequence[Tensor]) -> Tensor:
    # Sums in float64 hold the squares of every float32, so there is nothing to look at twice. Torch has more threads.
    if pieces[0].dtype is not torch.float64 and torch.get_num_threads() == 1:
        kernels = native(pieces, worth=_WORTH_NATIVE)
        if kernels is not None:
            return torch.from_numpy(np.sqrt(kernels.squares(pieces)))
    plan = _plan(tuple([piece.numel() for piece in pieces]), pieces[0].dtype)
    norms = np.zeros(len(pieces))
    if plan.order:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            squares = np.square(_parts(pieces, plan), dtype=np.float64)
            norms[plan.order] = np.sqrt(np.add.reduceat(squares, plan.starts))
    # A norm below its floor, inf, or 0 is looked at again; nan is not (it compares false).
    for position in np.flatnonzero((norms < plan.floors) | np.isinf(norms)).tolist():
        low, high = torch.aminmax(pieces[position])
        absmax = max(high.item(), -low.item())
        norms[position] = _rescaled_norm(pieces[position]).item() if 0 < absmax < float("inf") else absmax
    return torch.from_numpy(norms)


def _parts(pieces: Sequence[Tensor], plan: _Plan) -> Any:
    """Return a numpy array whose squares add up, in the segments of the plan, to the squared norms."""
    accumulate = plan.accumulate
    parts = []
    if plan.tiny:
        parts.append(torch.cat([pieces[p].view(-1) for p in plan.tiny]).to(accumulate))
    if plan.small:
        parts.append(torch.stack(torch._foreach_norm([pieces[p] for p in plan.small], 2, dtype=accumulate)))
    for position, width, tail in plan.big:
        piece = pieces[position]
        if tail:
            piece = piece.view(-1)
            parts.append(torch.linalg.vector_norm(piece[-tail:], dtype=accumulate).view(1))
            piece = piece[:-tail]
        parts.extend(_row_norms(piece, width, accumulate))
    return torch.cat(parts).numpy()


def _row_norms(piece: Tensor, width: int, accumulate: torch.dtype) -> list[Tensor]:
    """Return norms of the rows of a piece whose length is a multiple of `width`."""
    rows = piece.view(-1, width)
    if rows.dtype is accumulate:
        return [torch.linalg.vector_norm(rows, dim=1)]
    # With `dtype=` a half-precision tensor is first converted as a whole; in pieces that fit the cache it is 5x faster.
    chunks = rows.split(_HALF_CHUNK // width)
    scratch = torch.empty(chunks[0].shape, dtype=accumulate)
    return [torch.linalg.vector_norm(scratch[: len(c)].copy_(c), dim=1) for c in chunks]


class _Plan:
    """How a list of tensors of these sizes is cut into parts; kept between steps.

    Attributes:
        tiny: positions of tensors that are copied out whole.
        small: positions of tensors whose norm is taken whole.
        big: (position, width of rows, elements left over) of those that are read in rows.
        order: positions of all three in turn: one segment of parts each.
        starts: where each segment begins.
        floors: norms below which float32 squares have lost digits.
    """

    def __init__(self, numels: tuple[int, ...], dtype: torch.dtype) -> None:
        self.accumulate = torch.promote_types(dtype, torch.float32)
        self.tiny = [p for p, n in enumerate(numels) if 0 < n <= _TINY]
        self.small = [p for p, n in enumerate(numels) if _TINY < n <= _WHOLE]
        self.big = [(p, (width := _row_width(n)), n % width) for p, n in enumerate(numels) if n > _WHOLE]
        self.order = self.tiny + self.small + [p for p, _, _ in self.big]
        lengths = [numels[p] for p in self.tiny] + [1] * len(self.small)
        lengths += [numels[p] // width + (tail > 0) for p, width, tail in self.big]
        self.starts = np.cumsum([0, *lengths[:-1]])
        self.floors = np.sqrt(np.asarray(numels, np.float64)) * _TINY_RMS[self.accumulate]
        if self.accumulate is torch.float32:
            self.floors[self.tiny] = 0.0


_plan = lru_cache(maxsize=64)(_Plan)


def _row_width(numel: int) -> int:
    """Return a width near 2,048 that divides `numel` if there is one, else 2,048."""
    return next((width for width in (_ROW, *range(1536, 3073)) if numel % width == 0), _ROW)


def _rescaled_norm(piece: Tensor) -> Tensor:
    """Return the norm of a contiguous tensor through float64 copies of 8 MiB, its largest element scaled to 1."""
    wide = wide_dtype(piece.device)
    if not piece.numel():
        return torch.zeros((), dtype=wide, device=piece.device)
    low, high = torch.aminmax(piece)
    absmax = torch.maximum(high, -low).to(wide)
    scale = torch.where((absmax > 0) & torch.isfinite(absmax), absmax, 1.0)
    chunks = [torch.linalg.vector_norm(chunk.to(wide) / scale) for chunk in piece.view(-1).split(_CHUNK)]
    return torch.linalg.vector_norm(torch.stack(chunks)) * scale
