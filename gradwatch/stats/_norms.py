"""L2 norms of many tensors in one packed pass: exact to 1e-6 at any size, scale and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..torchside import Lent, home, is_host, lend_at_once, moved, wide_dtype
from ._native import native_at_hand
from ._shards import Shards, alike, put_together

__all__ = ["Row", "global_norm", "host_norms", "local_norms", "norms_apart", "second_look", "tensor_norms"]

# The float32 sum of n squares is off by up to n * 1e-9 where all are equal (1e8 random ones: 1e-2).
_WHOLE = 4096
_ROW = 2048
_TINY = 1024  # fewer elements are squared in float64 faster than one more kernel is called
_HALF_CHUNK = 1 << 16
_WORTH_NATIVE = 1 << 18
_NATIVE = frozenset({torch.float32, torch.bfloat16})
_CHUNK = 1 << 20
_FEW = 64  # so many tensors are read faster one by one than packed first
_SMALL = 1 << 16
# Below this root mean square the squares come near float32's smallest normal number and lose digits.
_TINY_RMS = {torch.float32: 1e-16, torch.float64: 1e-145}


@torch.no_grad()
def tensor_norms(tensors: Sequence[Tensor], *, of: Sequence[Tensor] | None = None) -> Tensor:
    """Return the L2 norm of each tensor, whole norms for sharded ones.

    Relative error about 1e-7 of the float64 norm for any size (below 3e-6 even where all elements are equal), from
    1e-40 to 1e38 per element. On the CPU, tensors of
    more than 4,096 elements are read as rows of about 2,048 whose norms are combined in float64; norms that float32
    could not hold are measured again, rescaled. On other devices nothing is read back, and sums are in float64; on one
    without it each tensor is divided by its largest element first.

    Args:
        tensors: plain, sparse, complex and distributed tensors of any dtypes, on any devices.
        of: the parameters that they belong to, where some may be those of a pipeline's other stages.

    Returns:
        float64 (float32 where there is none), shape (n,), on the tensors' device (of several, their `home`). nan or inf
        where a tensor holds one; 0 for an empty one.
        Costs one SUM all-reduce per mesh dimension that DTensors among them are split over.
    """
    shards = Shards(tensors, of)
    norms = local_norms(shards.locals)
    if not shards.groups:
        return norms
    return shards.sum_(norms.square_()).sqrt_()


def global_norm(norms: Tensor, *, in_range: bool = False) -> Tensor:
    """Return the L2 norm of all tensors seen as one vector, from their norms; 0-dim, float64. 0 for none.

    Right wherever float64 can hold it: norms whose squares it can't are taken relative to the largest.

    Args:
        norms: of the tensors.
        in_range: they are of tensors of at most float32's range: their squares are in float64's, and it takes one
            kernel.
    """
    norms = norms.to(wide_dtype(norms.device))
    if not norms.numel() or (in_range and norms.dtype is torch.float64):
        return torch.linalg.vector_norm(norms)
    largest = norms.amax()
    scale = _scale(largest)
    if norms.dtype is torch.float64:
        # The others keep their last bits.
        scale = torch.where((largest < 1e-140) | (largest > 1e140), scale, 1.0)
    return torch.linalg.vector_norm(norms / scale) * scale


@torch.no_grad()
def second_look(tensors: Sequence[Tensor], *, of: Sequence[Tensor] | None = None) -> Tensor:
    """Return norms as `tensor_norms` does, each rescaled by its largest element first: slower, at any scale.

    For tensors whose squares leave the range of the accumulator: in float32 elements below 1e-19 or above 1e19.
    """
    shards = Shards(tensors, of)
    if not shards.locals:
        return torch.zeros(0, dtype=torch.float64)
    device = home(shards.locals)
    norms = torch.stack([moved(_rescaled_norm(piece), device, wide_dtype(device)) for piece in shards.locals])
    return shards.sum_(norms.square_()).sqrt_() if shards.groups else norms


def local_norms(pieces: Sequence[Tensor]) -> Tensor:
    """Return norms of contiguous local pieces, float64, shape (n,); pieces of different kinds may be mixed."""
    if not pieces:
        return torch.zeros(0, dtype=torch.float64)
    groups = alike(pieces)
    if len(groups) == 1:
        return _norms_of_one_kind(pieces)
    parts = [_norms_of_one_kind([pieces[p] for p in positions]) for positions in groups]
    return put_together(parts, groups, home(pieces))


def _norms_of_one_kind(pieces: Sequence[Tensor]) -> Tensor:
    device = pieces[0].device
    if is_host(device):
        return _cpu_norms(pieces)
    if wide_dtype(device) is torch.float64:
        return norms_apart(pieces).tensor
    return torch.stack([_rescaled_norm(piece) for piece in pieces])


class Row:
    """Numbers of n tensors as a multi-tensor kernel gives them, one by one, until somebody wants them in one tensor.

    Attributes:
        parts: 0-dim tensors; None since they are in one.
    """

    __slots__ = ("_tensor", "parts")

    def __init__(self, numbers: Tensor | Sequence[Tensor]) -> None:
        self.parts: Sequence[Tensor] | None = None
        self._tensor: Tensor | None = None
        if isinstance(numbers, Tensor):
            self._tensor = numbers
        else:
            self.parts = numbers

    def __len__(self) -> int:
        return len(self.tensor if self.parts is None else self.parts)

    @property
    def tensor(self) -> Tensor:
        """All in one, shape (n,)."""
        if self._tensor is None:
            assert self.parts is not None
            self._tensor, self.parts = torch.stack(list(self.parts)), None
        return self._tensor

    @property
    def unread(self) -> Tensor | Sequence[Tensor]:
        """For a `Transfer`, which takes them either way."""
        return self.tensor if self.parts is None else self.parts


def norms_apart(pieces: Sequence[Tensor]) -> Row:
    """Return what `local_norms` does, by one kernel where the pieces are alike, and on a device with float64."""
    if pieces and not is_host(pieces[0].device) and len(alike(pieces)) == 1:
        wide = wide_dtype(pieces[0].device)
        if wide is torch.float64:
            return Row(torch._foreach_norm(list(pieces), 2, dtype=wide))
    return Row(local_norms(pieces))


def host_norms(pieces: Sequence[Tensor], lent: Lent | None = None) -> tuple[NDArray[np.float64], float] | None:
    """Return `local_norms` of tensors on the host, and the norm of all, by one call of a compiled kernel; None where it
    can't have them.

    Its sums in float64 hold the squares of every float32: nothing is looked at twice.

    Args:
        pieces: the tensors.
        lent: what `lend_at_once` gives for these now, where somebody has asked.
    """
    dtype = pieces[0].dtype if pieces else None
    if dtype is None or dtype not in _NATIVE:
        return None
    if lent is None and (lent := lend_at_once(pieces, dtype=dtype)) is None:
        return None
    work = sum(lent[1]) + 256 * len(pieces)
    if work >= _WORTH_NATIVE and torch.get_num_threads() > 1:
        return None  # of large tensors torch makes more with several threads
    kernels = native_at_hand(work, worth=_WORTH_NATIVE)
    return None if kernels is None else kernels.norms_of(pieces, lent)


def _cpu_norms(pieces: Sequence[Tensor]) -> Tensor:
    found = host_norms(pieces)
    if found is not None:
        return torch.from_numpy(found[0])
    plan = _plan(tuple(map(Tensor.numel, pieces)), pieces[0].dtype)
    if plan.is_small:
        norms = torch.stack(torch._foreach_norm(list(pieces))).to(torch.float64).numpy()
    else:
        norms = np.zeros(len(pieces))
        if plan.order:
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                squares = np.square(_parts(pieces, plan), dtype=np.float64)
                norms[plan.order] = np.sqrt(np.add.reduceat(squares, plan.starts))
    if not (norms.min() >= plan.least and norms.max() < np.inf):
        # A norm below its floor, inf, or 0 is looked at again; nan is not (it compares false).
        doubtful = np.flatnonzero((norms < plan.floors) | np.isinf(norms))
        if len(doubtful):
            _look_again_(norms, doubtful.tolist(), pieces)
    return torch.from_numpy(norms)


def _look_again_(norms: Any, positions: list[int], pieces: Sequence[Tensor]) -> None:
    """Measure some norms again, rescaled or, many small ones at once, in float64."""
    is_wide = pieces[0].dtype is torch.float64
    together = [] if is_wide else [p for p in positions if pieces[p].numel() <= _SMALL]
    for position in sorted(set(positions).difference(together)):
        low, high = torch.aminmax(pieces[position])
        absmax = max(high.item(), -low.item())
        norms[position] = _rescaled_norm(pieces[position]).item() if 0 < absmax < float("inf") else absmax
    for start in range(0, len(together), _CHUNK // _SMALL):
        group = together[start : start + _CHUNK // _SMALL]
        starts = np.cumsum([0] + [pieces[p].numel() for p in group[:-1]])
        # float64 holds the square of every float32.
        elements = torch.cat([pieces[p].view(-1) for p in group]).double().numpy()
        norms[group] = np.sqrt(np.add.reduceat(np.square(elements), starts))


def _parts(pieces: Sequence[Tensor], plan: _Plan) -> Any:
    """Return a numpy array whose squares add up, in the segments of the plan, to the squared norms."""
    accumulate = plan.accumulate
    parts = []
    if plan.tiny:
        parts.append(_flattened([pieces[p] for p in plan.tiny]).to(accumulate))
    if plan.small:
        parts.append(torch.stack(torch._foreach_norm([pieces[p] for p in plan.small], 2, dtype=accumulate)))
    for position, width, tail in plan.big:
        piece = pieces[position]
        if tail:
            piece = piece.view(-1)
            parts.append(torch.linalg.vector_norm(piece[-tail:], dtype=accumulate).view(1))
            piece = piece[:-tail]
        parts.extend(_row_norms(piece, width, accumulate))
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).numpy()


# What data-parallel training packs its buckets with: one call, where views and `cat` are one for each tensor.
_flattened: Callable[[list[Tensor]], Tensor] = getattr(
    torch._utils, "_flatten_dense_tensors", lambda tensors: torch.cat([t.reshape(-1) for t in tensors])
)


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
        is_small: whether they are few enough, and short enough, to be taken whole in one call.
        starts: where each segment begins.
        floors: norms below which float32 squares have lost digits.
        least: the highest of the floors.
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
        self.is_small = not self.big and len(numels) <= _FEW and dtype is self.accumulate
        if self.accumulate is torch.float32 and not self.is_small:
            self.floors[self.tiny] = 0.0
        self.least = float(self.floors.max())


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
    scale = _scale(torch.maximum(high, -low).to(wide))
    chunks = [torch.linalg.vector_norm(chunk.to(wide) / scale) for chunk in piece.view(-1).split(_CHUNK)]
    return torch.linalg.vector_norm(torch.stack(chunks)) * scale


def _scale(absmax: Tensor) -> Tensor:
    """Return what to divide by so that the largest is 1; 1 where that says nothing."""
    return torch.where((absmax > 0) & torch.isfinite(absmax), absmax, 1.0)
