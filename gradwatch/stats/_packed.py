"""What many tensors hold, element by element, counted on a device in a few kernels, however many tensors there are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from ..torchside import sent, wide_dtype
from ._shards import alike, put_together

__all__ = ["NUM_BINS", "counted", "counted_apart", "exponent_codes", "forget_places"]

NUM_BINS = 512
_SMALL = 1 << 16
"""Elements up to which a tensor is packed with others; a larger one is worth kernels of its own."""
_ROOM = 1 << 19
"""Elements that are looked at together: some forty bytes each are wanted for the time being."""
_SHORT = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""Whose elements that are not finite are those of the last bins, and no others."""
_SHIFT = {torch.float32: (torch.int32, 23), torch.bfloat16: (torch.int16, 7)}


def exponent_codes(chunk: Tensor, out: Tensor | None = None) -> Tensor:
    """Return sign and exponent of each element, nine bits, as float32 has them; into `out` where that is given."""
    bits, shift = _SHIFT.get(chunk.dtype, (torch.int32, 23))
    if chunk.dtype not in _SHIFT:
        chunk = chunk.float()
    return torch.bitwise_right_shift(chunk.view(bits), shift, out=out).bitwise_and_(0x1FF)


def counted(
    pieces: Sequence[Tensor], *, details: bool = False, histograms: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Return zeros, non-finite elements and largest magnitudes, shape (n, 3), in the device's widest floats; and
    exponent histograms, int64, shape (n, 512). What was not asked for is None.

    Args:
        pieces: contiguous, of one dtype, on one device.
        details: count the former.
        histograms: count the latter.
    """
    groups = _bunches(pieces)
    rows: list[Tensor] = []
    counts: list[Tensor] = []
    for positions in groups:
        bunch = [pieces[p].view(-1) for p in positions]
        flat, owner = (bunch[0], None) if len(bunch) == 1 else _packed(bunch)
        if details:
            rows.append(_details(flat) if owner is None else _details_of_many(flat, owner, len(bunch)))
        if histograms:
            counts.append(_histogram(flat) if owner is None else _histograms_of_many(flat, owner, len(bunch)))
    device = pieces[0].device
    return (
        put_together(rows, groups, device) if details else None,
        put_together(counts, groups, device) if histograms else None,
    )


def counted_apart(pieces: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor] | None:
    """Return zeros and largest magnitudes, float64, one by one, and exponent histograms, int64, shape (n, 512).

    In ten kernels for every `_ROOM` elements. What is not finite is in the bins 255 and 511. None where it takes more:
    of large or empty tensors, of several dtypes, of float64, on a device without float64.

    Args:
        pieces: contiguous.
    """
    numels = list(map(Tensor.numel, pieces))
    device, dtype = pieces[0].device, pieces[0].dtype
    can = dtype in _SHORT and min(numels) > 0 and max(numels) <= _SMALL and len(alike(pieces)) == 1
    if not can or wide_dtype(device) is not torch.float64:
        return None
    zeros: list[Tensor] = []
    largest: list[Tensor] = []
    counts = torch.zeros(len(pieces), NUM_BINS, dtype=torch.int64, device=device)
    for positions in _bunches(pieces):
        sizes = tuple(numels[positions[0] : positions[-1] + 1])
        first, one = _places(sizes, device)
        flat = torch.cat([pieces[p].view(-1) for p in positions])  # a copy, also of one
        rows = counts[positions[0] : positions[-1] + 1].view(-1)
        rows.index_add_(0, first + exponent_codes(flat), one.expand(len(flat)))
        is_zero = torch.eq(flat, 0, out=torch.empty_like(flat))
        flat.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        zeros += torch._foreach_norm(is_zero.split(sizes), 1, dtype=torch.float64)
        largest += torch._foreach_norm(flat.split(sizes), torch.inf, dtype=torch.float64)
    return zeros, largest, counts


@lru_cache(maxsize=2)  # of so many bunches: eight bytes for each element
def _places(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where the bins of each element's tensor begin, and a one; kept between steps."""
    firsts = torch.arange(0, NUM_BINS * len(sizes), NUM_BINS).repeat_interleave(torch.tensor(sizes))
    return sent(firsts, device), torch.ones(1, dtype=torch.int64, device=device)


forget_places = _places.cache_clear


def _bunches(pieces: Sequence[Tensor]) -> list[list[int]]:
    """Return positions of the pieces that are looked at together."""
    bunches: list[list[int]] = []
    small: list[int] = []
    room = 0
    for position, numel in enumerate(map(Tensor.numel, pieces)):
        if numel > _SMALL:
            bunches.append([position])
            continue
        if not small or numel > room:
            small, room = [], _ROOM
            bunches.append(small)
        small.append(position)
        room -= numel
    return bunches


def _packed(bunch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the elements of flat tensors in a row, and which tensor each came from."""
    flat = torch.cat(list(bunch))
    ends = sent(torch.tensor(list(accumulate(map(Tensor.numel, bunch)))), flat.device)
    # Not `repeat_interleave`: on some devices it reads back how much there will be.
    return flat, torch.bucketize(torch.arange(flat.numel(), device=flat.device), ends, right=True)


def _histogram(flat: Tensor) -> Tensor:
    row = torch.zeros(NUM_BINS, dtype=torch.int64, device=flat.device)
    one = torch.ones(1, dtype=torch.int64, device=flat.device)
    for chunk in flat.split(_ROOM) if flat.numel() else ():
        codes = exponent_codes(chunk)
        # bincount reads its maximum back to the host; with fixed bins nothing needs to be read.
        row.index_add_(0, codes if codes.dtype is torch.int32 else codes.int(), one.expand(len(codes)))
    return row[None]


def _histograms_of_many(flat: Tensor, owner: Tensor, count: int) -> Tensor:
    rows = torch.zeros(count * NUM_BINS, dtype=torch.int64, device=flat.device)
    one = torch.ones(1, dtype=torch.int64, device=flat.device)
    places = (owner * NUM_BINS).add_(exponent_codes(flat))
    return rows.index_add_(0, places, one.expand(len(places))).view(count, NUM_BINS)


def _details(flat: Tensor) -> Tensor:
    wide = wide_dtype(flat.device)
    if not flat.numel():
        return torch.zeros(1, 3, dtype=wide, device=flat.device)
    magnitudes = flat.abs()
    absmax = torch.where(torch.isnan(magnitudes), 0.0, magnitudes).amax()
    found = [(flat == 0).sum(), (~torch.isfinite(flat)).sum(), absmax]
    return torch.stack([value.to(wide) for value in found])[None]


def _details_of_many(flat: Tensor, owner: Tensor, count: int) -> Tensor:
    wide = wide_dtype(flat.device)
    # Whole numbers that are exact in any wide dtype: no tensor here has more than `_SMALL` elements.
    rows = torch.zeros(3, count, dtype=wide, device=flat.device)
    zeros, nonfinite, absmax = rows.unbind()
    zeros.index_add_(0, owner, (flat == 0).to(wide))
    nonfinite.index_add_(0, owner, (flat * 0 != 0).to(wide))  # what is not finite times nothing is nan
    magnitudes = flat.abs().nan_to_num_(nan=0.0, posinf=torch.inf).to(wide)
    absmax.scatter_reduce_(0, owner, magnitudes, "amax")
    return rows.t()
