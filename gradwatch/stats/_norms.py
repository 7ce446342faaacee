"""L2 norms of many tensors in one packed pass: exact to 1e-6 at any size, scale and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ._shards import Shards, index_on

__all__ = ["global_norm", "local_norms", "second_look", "tensor_norms", "wide_dtype"]

# The float32 sum of n squares is off by up to n * 1e-9 where all are equal (1e8 random ones: 1e-2).
_WHOLE = 8192
_ROW = 1024
_HALF_CHUNK = 1 << 16
_CHUNK = 1 << 20
# Below this root mean square the squares come near float32's smallest normal number and lose digits.
_TINY_RMS = {torch.float32: 1e-16, torch.float64: 1e-145}


@torch.no_grad()
def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of each tensor, whole norms for sharded ones.

    Relative error below 1e-6 of the float64 norm for any size, from 1e-40 to 1e38 per element. On the CPU, tensors of
    more than 8,192 elements are read as rows of about 1,024 whose norms are combined in float64; norms that float32
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
    """Return norms of flat local pieces, float64, shape (n,); pieces of different dtypes may be mixed."""
    if not pieces:
        return torch.zeros(0, dtype=torch.float64)
    first = pieces[0].dtype
    if all(piece.dtype is first for piece in pieces):
        return _norms_of_one_dtype(pieces)
    norms = torch.empty(len(pieces), dtype=wide_dtype(pieces[0].device), device=pieces[0].device)
    by_dtype: dict[torch.dtype, list[int]] = {}
    for position, piece in enumerate(pieces):
        by_dtype.setdefault(piece.dtype, []).append(position)
    for positions in by_dtype.values():
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
    plan = _plan(tuple([piece.numel() for piece in pieces]))
    accumulate = torch.promote_types(pieces[0].dtype, torch.float32)
    parts = list(pieces) if not plan.big else [pieces[p] for p in plan.small]
    parts.extend([pieces[position][-tail:] for position, _, tail in plan.big if tail])
    found = [torch.stack(torch._foreach_norm(parts, 2, dtype=accumulate))] if parts else []
    for position, width, tail in plan.big:
        piece = pieces[position]
        found.extend(_row_norms((piece[:-tail] if tail else piece), width, accumulate))
    if plan.big:
        squares = torch.cat(found).double().square_()
        norms = torch.zeros(len(pieces), dtype=torch.float64).index_add_(0, plan.owner, squares).sqrt_()
    else:
        norms = found[0].double()
    floors = plan.root_numels * _TINY_RMS[accumulate]
    # A norm below its floor, inf, or 0 is looked at again; nan is not (it compares false).
    for position in ((norms < floors) | torch.isinf(norms)).nonzero().flatten().tolist():
        low, high = torch.aminmax(pieces[position])
        absmax = torch.maximum(high, -low)
        norms[position] = _rescaled_norm(pieces[position]) if 0 < absmax < torch.inf else absmax
    return norms


def _row_norms(piece: Tensor, width: int, accumulate: torch.dtype) -> list[Tensor]:
    """Return norms of the rows of a piece whose length is a multiple of `width`."""
    if piece.dtype is accumulate:
        return [torch.linalg.vector_norm(piece.view(-1, width), dim=1)]
    # With `dtype=` a half-precision tensor is first converted as a whole; in pieces that fit the cache it is 5x faster.
    chunks = piece.split(_HALF_CHUNK // width * width)
    scratch = torch.empty(chunks[0].numel(), dtype=accumulate)
    return [torch.linalg.vector_norm(scratch[: c.numel()].copy_(c).view(-1, width), dim=1) for c in chunks]


class _Plan:
    """How a list of tensors of these sizes is cut into parts; kept between steps."""

    def __init__(self, numels: tuple[int, ...]) -> None:
        self.numels = numels
        self.small = [p for p, n in enumerate(numels) if n <= _WHOLE]
        self.big = [(p, (width := _row_width(n)), n % width) for p, n in enumerate(numels) if n > _WHOLE]
        self.root_numels = torch.tensor(numels, dtype=torch.float64).sqrt_()
        tails = [p for p, _, tail in self.big if tail]
        owners = torch.tensor(self.small + tails + [p for p, _, _ in self.big], dtype=torch.int64)
        repeats = [1] * (len(self.small) + len(tails)) + [numels[p] // width for p, width, _ in self.big]
        self.owner = torch.repeat_interleave(owners, torch.tensor(repeats, dtype=torch.int64))


_plan = lru_cache(maxsize=32)(_Plan)


def _row_width(numel: int) -> int:
    """Return a width near 1,024 that divides `numel` if there is one, else 1,024."""
    return next((width for width in (_ROW, *range(768, 1537)) if numel % width == 0), _ROW)


def _rescaled_norm(piece: Tensor) -> Tensor:
    """Return the norm of a flat tensor through float64 copies of at most 8 MiB, scaled to a largest element of 1."""
    wide = wide_dtype(piece.device)
    if not piece.numel():
        return torch.zeros((), dtype=wide, device=piece.device)
    low, high = torch.aminmax(piece)
    absmax = torch.maximum(high, -low).to(wide)
    scale = torch.where((absmax > 0) & torch.isfinite(absmax), absmax, 1.0)
    chunks = [torch.linalg.vector_norm(chunk.to(wide) / scale) for chunk in piece.split(_CHUNK)]
    return torch.linalg.vector_norm(torch.stack(chunks)) * scale
