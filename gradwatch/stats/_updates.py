"""How far the optimizer moves each parameter, for any optimizer: measured before and after its step."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..torchside import (
    can_lend_all,
    home,
    is_host,
    largest_piece,
    lend,
    local_of,
    moved,
    pipeline_of,
    whole_of,
    wide_dtype,
)
from ._native import native_lent
from ._norms import norms_apart
from ._shards import Shards, alike, put_together
from ._update_samples import Sample, can_sample, least_room, room_for_each

__all__ = ["UpdateMeter", "UpdateStats"]

_ALIGN = 64
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_SHAPE = attrgetter("shape")
# What data-parallel training takes its buckets apart with: one call, where views are two for each tensor.
_cut_apart: Callable[..., Any] | None = getattr(torch._utils, "_unflatten_dense_tensors", None)
_WORTH_NATIVE = 1 << 18
_PIECE = 1 << 20
_NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class UpdateStats:
    """Updates of some parameters, on their device.

    Attributes:
        positions: which parameters were measured.
        update_norms: norm of (parameter after the step - before), float64, shape (len(positions),); -1 for all where
            some rank had nothing to say.
        param_norms: norm of the parameter before the step, float64, the same shape.
        errors: standard error of the update's norm, relative to it, the same shape; 0 where all elements were compared;
            None where they were of all parameters, on all ranks.
        lost: elements of parameters in 16 bits that had a gradient and are after the step what they were before: their
            update was rounded away. Of those compared; wide, the same shape; None where no parameter has 16 bits.
        given: elements of these that had a gradient; 0 for other parameters.
        both: the former two in one tensor, shape (2, len(positions)), where one kernel has put them there.
    """

    positions: list[int]
    update_norms: Tensor
    param_norms: Tensor
    errors: Tensor | None
    lost: Tensor | None = None
    given: Tensor | None = None
    both: Tensor | None = None


class UpdateMeter:
    """Measures updates through copies of parameters, within a bound on memory.

    Where copies of all parameters don't fit, of the large ones a sample of their elements is copied, the same at every
    step: sums of squares are then estimates, right on the average, with an error that is stated. Every parameter is
    measured every time, but those of which not even the smallest sample fits: `left_out`.

    Norms of parameters in pieces cost one SUM all-reduce per mesh dimension in `after`. Every rank must take part,
    also one that did not step, or whose copies failed: its `before(blank=True)` says so, a failure does by itself.

    Args:
        params: parameters, plain or distributed; for the bound count the largest local pieces, so that all ranks leave
            out the same.
        memory_limit_bytes: of all copies together.

    Attributes:
        left_out: positions of parameters that can't be measured within the bound. Those of a kind that can't be copied
            and subtracted (nested, sparse, 8 bits) are not measured either.
        is_sampled: whether of any a sample is measured, on whatever rank.
        in_pieces: whether any parameter is split over ranks.

    Raises:
        ConfigError: the bound is negative.
    """

    def __init__(self, params: Sequence[Tensor], memory_limit_bytes: int) -> None:
        if not memory_limit_bytes >= 0:
            raise ConfigError(f"`memory_limit_bytes` must be at least 0. Got {memory_limit_bytes}.")
        self._params = list(params)
        self._chosen: list[int] | None = None
        self._copies: list[Tensor] | None = []
        self._cut: list[Tensor] = []
        self._arenas: dict[torch.device, Tensor] = {}
        self._pages: mmap.mmap | None = None
        self.in_pieces = pipeline_of(self._params) is not None or any(map(_is_split, self._params))
        needs = list(map(_bytes, self._params))
        self.left_out, shared = _too_large(needs, list(map(_least, self._params)), memory_limit_bytes)
        never = {i for i, param in enumerate(self._params) if not _has_copies(param)}.union(self.left_out)
        self._measured = [i for i in range(len(self._params)) if i not in never]
        # What is left out takes no room; nor does what lies on another stage of a pipeline.
        mine = [0 if i in never else min(need, _padded(_local(self._params[i]))) for i, need in enumerate(needs)]
        room = room_for_each(mine, memory_limit_bytes) // _ALIGN * _ALIGN
        self._samples = {i: Sample(_local(self._params[i]), room, i) for i in self._measured if mine[i] > room}
        self.is_sampled = any(needs[i] > shared for i in self._measured)
        self._are_narrow = any(param.dtype in _NARROW for param in self._params)

    @property
    def held_bytes(self) -> int:
        """Memory held for copies now, also between steps."""
        return sum(arena.numel() for arena in self._arenas.values())

    @torch.no_grad()
    def before(self, *, blank: bool = False) -> None:
        """Copy the parameters. Call it right before the optimizer's step.

        Args:
            blank: take part in `after`, with nothing to say; no rank then learns these updates.
        """
        self._chosen, self._copies = self._measured, None
        if blank:
            return
        pieces = _locals([self._params[i] for i in self._chosen])
        copies = self._room_for(pieces)
        whole = [k for k, i in enumerate(self._chosen) if i not in self._samples]
        for into, sources in _grouped([copies[k] for k in whole], [pieces[k] for k in whole]):
            _copy_(into, sources)
        for k, i in enumerate(self._chosen):
            if i in self._samples:
                self._samples[i].copy(pieces[k], copies[k])
        self._copies = copies

    @torch.no_grad()
    def after(self) -> UpdateStats:
        """Return how far those parameters moved. Call it right after the optimizer's step.

        Raises:
            RuntimeError: `before` was not called.
        """
        if self._chosen is None:
            raise RuntimeError("`UpdateMeter.after` needs a call of `before` first.")
        chosen, params = self._chosen, [self._params[i] for i in self._chosen]
        found: Tensor | Sequence[Tensor] | None = None
        try:
            if self._copies is not None:
                found = self._moved(self._copies, _locals(params))
        finally:
            # Also where that failed: the other ranks wait.
            self.discard()
            if found is None or self.in_pieces:
                found = self._whole(params, found).unbind(dim=1)
        updates, norms = found[0], found[1]
        # Counts travel as roots, like norms, whose squares are what adds up.
        lost, given = (root.square().round() for root in found[-2:]) if self._are_narrow else (None, None)
        if not self.is_sampled:
            both = found if isinstance(found, Tensor) and found.shape[0] == 2 else None
            return UpdateStats(chosen, updates, norms, None, lost, given, both)
        deviations = found[2]
        # Of a root half the relative error of the square.
        errors = torch.where(updates > 0, deviations / (2 * updates.square()), 0.0)
        return UpdateStats(chosen, updates, norms, errors, lost, given)

    def _moved(self, copies: list[Tensor], pieces: list[Tensor]) -> Tensor | Sequence[Tensor]:
        """Return norms of updates and of parameters here; with samples also the deviations of the former's squares;
        with parameters in 16 bits the roots of what `_counts` gives."""
        if not self._are_narrow:
            return self._norms(copies, pieces)
        counts = self._counts(copies, pieces).sqrt()  # first: the copies are overwritten
        norms = torch.stack(list(self._norms(copies, pieces)), dim=1)
        return torch.cat([norms, moved(counts, norms.device, norms.dtype)], dim=1).unbind(dim=1)

    def _counts(self, copies: list[Tensor], pieces: list[Tensor]) -> Tensor:
        """Return how many updates were rounded away and how many elements had a gradient, wide, shape (n, 2)."""
        assert self._chosen is not None
        rows, device = [], home(pieces)
        wide = wide_dtype(device)
        for i, before, piece in zip(self._chosen, copies, pieces, strict=True):
            grad = _gradient(self._params[i], piece) if piece.dtype in _NARROW else None
            if grad is None:
                rows.append(torch.zeros(2, dtype=wide, device=device))
                continue
            sample = self._samples.get(i)
            now, grad = (piece, grad) if sample is None else (sample.of(piece), sample.of(grad))
            parts = zip(*(_cut(t) for t in (before, now, grad)), strict=True)
            found = [torch.stack([((a == b) & (g != 0)).sum(), (g != 0).sum()]) for a, b, g in parts]
            rows.append(moved(torch.stack(found).sum(dim=0), device, wide))
        return torch.stack(rows)

    def _norms(self, copies: list[Tensor], pieces: list[Tensor]) -> Tensor | Sequence[Tensor]:
        assert self._chosen is not None
        if not self._samples:
            found = _moved(copies, pieces)
            return (found[0], found[1], torch.zeros_like(found[0])) if self.is_sampled else found
        groups = [[k for k, i in enumerate(self._chosen) if (i in self._samples) == kind] for kind in (False, True)]
        device = home(pieces)
        wide = wide_dtype(device)
        whole = torch.stack(tuple(_moved([copies[k] for k in groups[0]], [pieces[k] for k in groups[0]])), dim=1)
        rows = [torch.cat([moved(whole, device, wide), torch.zeros(len(whole), 1, dtype=wide, device=device)], dim=1)]
        samples = [self._samples[self._chosen[k]].moved(copies[k], pieces[k]) for k in groups[1]]
        rows += [moved(found, device, wide).sqrt()[None] for found in samples]
        table = put_together(list(filter(len, rows)), list(filter(None, groups)), device)
        return table.unbind(dim=1)

    def _whole(self, params: list[Tensor], found: Tensor | Sequence[Tensor] | None) -> Tensor:
        """Put the pieces' norms and deviations together; -1 for all, on all ranks, where any rank has none."""
        if found is None:
            device = home(self._params)
            width = (3 if self.is_sampled else 2) + 2 * self._are_narrow
            squares = torch.full((len(params), width), -torch.inf, dtype=wide_dtype(device), device=device)
        else:
            squares = torch.stack(list(found), dim=1).square()
        Shards(params, params).sum_(squares)
        return torch.where(torch.isneginf(squares).any(), -1.0, squares.sqrt())

    def discard(self) -> None:
        """Forget the copies: the step did not happen. The memory is kept for the next ones."""
        self._chosen, self._copies = None, []

    def release(self, *, soon_again: bool = False) -> None:
        """Give the memory back.

        Args:
            soon_again: the next step needs as much: the host's pages are lent to the system, which takes them where
                memory is short, and else they are there without being paged in anew.
        """
        self.discard()
        self._arenas.clear()
        self._cut = []
        if self._pages is not None and soon_again:
            self._pages.madvise(mmap.MADV_FREE)
        else:
            self._pages = None

    def _room_for(self, pieces: list[Tensor]) -> list[Tensor]:
        """Return tensors like the pieces, cut from one block of memory per device that is kept between calls; of those
        that are sampled a row of as many elements."""
        assert self._chosen is not None
        if not self._samples and (cut := self._cut_at_once(pieces)) is not None:
            return cut
        shapes = [
            self._samples[i].shape if i in self._samples else piece.shape
            for i, piece in zip(self._chosen, pieces, strict=True)
        ]
        if len(self._cut) == len(pieces) and all(map(_alike, self._cut, pieces, shapes)):
            return self._cut
        need: dict[torch.device, int] = {}
        offsets = []
        for piece, shape in zip(pieces, shapes, strict=True):
            offsets.append(need.get(piece.device, 0))
            need[piece.device] = offsets[-1] + -(-shape.numel() * piece.element_size() // _ALIGN) * _ALIGN
        for device, size in need.items():
            if device not in self._arenas or self._arenas[device].numel() < size:
                self._arenas[device] = self._block(size, device)
        self._cut = [
            self._arenas[piece.device][at : at + shape.numel() * piece.element_size()].view(piece.dtype).view(shape)
            for at, piece, shape in zip(offsets, pieces, shapes, strict=True)
        ]
        return self._cut

    def _block(self, size: int, device: torch.device) -> Tensor:
        """Return bytes that nobody has written to; some where none are asked for, whose pieces of no length are tensors
        of any type."""
        size = max(size, _ALIGN)
        if not is_host(device):
            return torch.empty(size, dtype=torch.uint8, device=device)
        if self._pages is None or len(self._pages) < size:
            self._pages = _pages_of(size)
        if self._pages is None:
            return torch.from_numpy(np.empty(size, np.uint8))
        return torch.from_numpy(np.frombuffer(self._pages, np.uint8, size))

    def _cut_at_once(self, pieces: list[Tensor]) -> list[Tensor] | None:
        """Return what `_room_for` does on the host, where one call cuts all; None where they are not alike."""
        if _cut_apart is None or not pieces or not is_host(pieces[0].device) or len(alike(pieces)) > 1:
            return None
        if len(self._cut) == len(pieces) and all(map(_alike, self._cut, pieces, map(_SHAPE, pieces))):
            return self._cut
        first = pieces[0]
        size = sum(map(Tensor.numel, pieces)) * first.element_size()
        held = self._arenas.get(first.device)
        if held is None or held.numel() < size:
            self._arenas[first.device] = held = self._block(size, first.device)
        self._cut = list(_cut_apart(held[:size].view(first.dtype), pieces))
        return self._cut


_LARGE = 2**20
"""Bytes of a tensor, on the average, from which on copying them one by one takes less time than torch's one call."""
_WORTH_PAGES = 2**20
"""Bytes from which on memory that is paged in anew costs more than what is done with it."""


def _pages_of(size: int) -> mmap.mmap | None:
    """Return private memory that can be lent to the system between steps; None where that can't be."""
    if size < _WORTH_PAGES or not hasattr(mmap, "MADV_FREE"):
        return None
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_FREE)  # whether this system can
    except (OSError, ValueError):
        return None
    with suppress(OSError, AttributeError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _copy_(copies: list[Tensor], sources: list[Tensor]) -> None:
    is_worth = sum(map(Tensor.numel, sources)) * sources[0].element_size() >= _LARGE * len(sources)
    if not (is_worth and is_host(copies[0].device)) or torch.get_num_threads() > 1 or not can_lend_all(sources):
        torch._foreach_copy_(copies, sources)
        return
    # The C library's copy passes by the caches: of large tensors a third less time than torch's.
    dtype, device = copies[0].dtype, copies[0].device
    into = lend(copies, dtype=dtype, device=device, copy=False)
    out_of = lend(sources, dtype=dtype, device=device)
    sizes = (out_of.numels * dtype.itemsize).tolist()
    for target, source, size in zip(into.addresses.tolist(), out_of.addresses.tolist(), sizes, strict=True):
        ctypes.memmove(target, source, size)


def _moved(copies: list[Tensor], params: list[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """Return norms of (copy - parameter) and of the copy, in one tensor where they come together; the copies may be
    overwritten."""
    if copies and is_host(copies[0].device) and len(alike(copies)) == 1:
        is_theirs = torch.get_num_threads() == 1 and copies[0].dtype is not torch.float64
        at_hand = native_lent([*copies, *params], worth=_WORTH_NATIVE) if is_theirs else None
        if at_hand is not None:
            kernels, lent = at_hand
            update_norms, param_norms = torch.from_numpy(np.sqrt(kernels.moved(copies, params, lent))).unbind(dim=1)
            return update_norms, param_norms
    before = norms_apart(Shards(copies).locals)
    for into, sources in _grouped(copies, params):
        torch._foreach_sub_(into, sources)
    after = norms_apart(Shards(copies).locals)
    if before.parts is None or after.parts is None:
        return after.tensor, before.tensor
    return torch.stack([*after.parts, *before.parts]).view(2, -1)


def _grouped(into: list[Tensor], sources: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    if len(alike(into)) == 1 and all(map(Tensor.numel, into)):
        return [(into, sources)]
    groups: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(into, sources, strict=True):
        if target.numel():
            pair = groups.setdefault((target.device, target.dtype), ([], []))
            pair[0].append(target)
            pair[1].append(source)
    return list(groups.values())


def _gradient(param: Any, piece: Tensor) -> Tensor | None:
    """Return the gradient of what lies here of a parameter; None where there is none like it."""
    grad = param.grad
    local = None if grad is None else local_of(_local(grad))
    is_like = local is not None and local.layout is torch.strided and local.shape == piece.shape
    return local if is_like else None


def _cut(tensor: Tensor) -> Sequence[Tensor]:
    """Return pieces, as views where that can be, so small that what is compared of them takes no memory to speak of."""
    return tensor.reshape(-1).split(_PIECE) if tensor.numel() > _PIECE else (tensor,)


def _local(param: Any) -> Tensor:
    dtensor = sys.modules.get("torch.distributed.tensor")
    if dtensor is not None and isinstance(param, dtensor.DTensor):
        return param.detach().to_local()
    return param.detach()


def _locals(params: Sequence[Tensor]) -> list[Tensor]:
    """Return `_local` of each, to be read where nothing is recorded: of plain ones these themselves."""
    if _PLAIN.issuperset(map(type, params)):
        return list(params)
    return list(map(_local, params))


def _alike(one: Tensor, other: Tensor, shape: torch.Size) -> bool:
    return one.shape == shape and one.dtype is other.dtype and one.device == other.device


def _padded(piece: Tensor) -> int:
    return -(-piece.numel() * piece.element_size() // _ALIGN) * _ALIGN


def _least(param: Any) -> float:
    """Return the bytes that the smallest sample of the largest piece takes; inf of what can't be sampled."""
    if not can_sample(_local(param)):
        return math.inf
    return least_room(largest_piece(param), param.element_size())


def _too_large(needs: Sequence[int], least: Sequence[float], limit: int) -> tuple[list[int], int]:
    """Return which tensors not even a sample fits of, and the bytes that each of the others may take.

    The one whose smallest sample is the largest is left out first: what it leaves is the others'.
    """
    left = {i for i, need in enumerate(needs) if min(need, least[i]) > limit}
    while True:
        shared = room_for_each([0 if i in left else need for i, need in enumerate(needs)], limit)
        rest = [i for i, need in enumerate(needs) if i not in left and need > shared and least[i] > shared]
        if not rest:
            return sorted(left), shared
        left.add(max(rest, key=lambda i: (least[i], i)))


def _has_copies(param: Any) -> bool:
    """Return whether a parameter can be copied and subtracted: not a nested, sparse or 8-bit one."""
    local = _local(param)
    wide = (local.is_floating_point() or local.is_complex()) and local.dtype.itemsize > 1
    return wide and local.layout is torch.strided and not local.is_nested


def _is_split(param: Any) -> bool:
    if whole_of(param) is not None:
        return True
    dtensor = sys.modules.get("torch.distributed.tensor")
    if dtensor is None or not isinstance(param, dtensor.DTensor):
        return False
    return any(not p.is_replicate() and param.device_mesh.size(i) > 1 for i, p in enumerate(param.placements))


def _bytes(param: Any) -> int:
    """Return the bytes of a copy of the largest piece on any rank."""
    if not _has_copies(param):
        return 0
    return -(-largest_piece(param) * param.element_size() // _ALIGN) * _ALIGN
