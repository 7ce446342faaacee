"""Makes a record equal on all ranks, so that every decision taken from it is equal by construction.

Gradients and their norms are equal already (reduced by DDP, or whole through their shards' collectives). What differs
from rank to rank (loss, batch, activations, validation metrics) travels in one packed SUM all-reduce a step, and on
sampled steps in one MAX besides; every rank takes part in both, always, also one that could not measure.
Under FSDP2 and tensor parallelism the norms of the pieces travel in the same vector.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from .._text import as_bytes
from ..stats import Exchange
from ..torchside import are_several, moved, sent, wide_dtype, world_size

__all__ = [
    "BATCH_SCALARS",
    "NUM_SAID",
    "NUM_SLOTS",
    "are_several",
    "combine",
    "is_writer",
    "say_the_same",
    "merged_extras",
    "pack_extras",
    "rank_and_size",
    "world_size",
]

NUM_SLOTS, NUM_SAID = 64, 3
"""Numbers known on each rank's host that travel along: validation metrics, cosines between tasks, seconds; and what a
rank says of itself (see `Accord`)."""

# A fixed list, so that the packed vector has one layout on all ranks whatever a rank's batch could tell.
_MEANS = (
    "input_mean",
    "input_std",
    "batch_size",
    "output_units",
    "output_batch_variance",
    "output_log_z",
    "target_is_integer",
    "num_classes",
    "expected_initial_loss",
    "target_entropy",
    "baseline_loss",
    "squared_error",
    "squared_error_of_pairs",
    "target_variance",
    "cross_entropy",
    "cross_entropy_of_probabilities",
    "cross_entropy_over_batch",
    "cross_entropy_twice",
)
_MAXIMA = ("input_absmax", "output_max", "output_row_sum_max", "target_max", "target_row_sum_max", "shape_mismatch")
_MINIMA = ("output_min", "output_row_sum_min", "target_min", "target_row_sum_min")
BATCH_SCALARS = (*_MEANS, *_MAXIMA, *_MINIMA)


def rank_of_this() -> int:
    return dist.get_rank() if are_several() else 0


def is_writer() -> bool:
    """Whether this rank writes: rank zero alone does."""
    return rank_of_this() == 0


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def say_the_same(text: str, device: torch.device) -> bool:
    """Return whether all ranks say the same, by one SUM of two numbers, for which the host waits."""
    wide = wide_dtype(device)
    check = float(zlib.crc32(as_bytes(text)) & (0xFFFFF if wide is torch.float64 else 0xFF))
    both = torch.tensor([check, check**2], dtype=wide, device=device)
    dist.all_reduce(both)
    total, squares = both.tolist()
    return bool(world_size() * squares == total**2)


def _packed(scalars: Mapping[str, Tensor | float], device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    low = float("-inf")
    sums = {
        "#values": torch.stack([_on(scalars.get(n, 0.0), device) for n in _MEANS]),
        "#present": torch.stack([_on(float(n in scalars), device) for n in _MEANS]),
        "#has_max": torch.stack([_on(float(n in scalars), device) for n in (*_MAXIMA, *_MINIMA)]),
    }
    top = [_on(scalars.get(n, low), device) for n in _MAXIMA]
    bottom = [-_on(scalars.get(n, -low), device) for n in _MINIMA]
    return sums, {"#extremes": torch.stack([*top, *bottom])}


def combine(
    sums: dict[str, Tensor],
    maxima: dict[str, Tensor],
    scalars: Mapping[str, Tensor | float] | None,
    device: torch.device,
    *,
    exchange: Exchange,
    rows: Tensor | None = None,
    row_maxima: Tensor | None = None,
) -> dict[str, Tensor | float]:
    """Reduce over ranks: `sums` and `maxima` in place, the batch's scalars as means, maxima and minima.

    Args:
        sums: name -> float64 tensor, replaced by its sum over ranks.
        maxima: name -> float64 tensor, replaced by its maximum over ranks.
        scalars: of the batch, on sampled steps; None on the others.
        device: where to reduce.
        exchange: carries it out.
        rows, row_maxima: of the gradients' pieces, replaced by those of whole gradients.

    Returns:
        The batch's scalars over all ranks.
    """
    if exchange.num_ranks == 1:
        return dict(scalars or {})
    if scalars is not None:
        more_sums, more_maxima = _packed(scalars, device)
        sums |= more_sums
        maxima |= more_maxima
    _reduce(sums, exchange.sum_, rows, device)
    if maxima or row_maxima is not None:
        _reduce(maxima, exchange.max_, row_maxima, device)
    if scalars is None:
        return {}
    # Which names are known on some rank must be equal on all ranks, so that records are: a mean over no rank is nan.
    values, present = sums.pop("#values"), sums.pop("#present")
    means = values / present
    extremes, has = maxima.pop("#extremes"), sums.pop("#has_max")
    extremes = torch.where(has > 0, extremes, torch.nan)
    result: dict[str, Tensor | float] = {n: means[i] for i, n in enumerate(_MEANS)}
    result |= {n: extremes[i] for i, n in enumerate(_MAXIMA)}
    result |= {n: -extremes[len(_MAXIMA) + i] for i, n in enumerate(_MINIMA)}
    return result


def pack_extras(extras: Mapping[str, float], device: torch.device, said: Sequence[float] = ()) -> Tensor:
    """Return numbers of this rank's host as a vector of fixed length, with a checksum of their names before them.

    Args:
        extras: numbers by name.
        device: where they travel from.
        said: what the rank says of itself, `NUM_SAID` numbers that stand last; nothing: zeros.
    """
    names = sorted(extras)[:NUM_SLOTS]
    wide = wide_dtype(device)
    # Its square, summed over ranks, must be exact.
    check = zlib.crc32(as_bytes("\n".join(names))) & (0xFFFFF if wide is torch.float64 else 0xFF)
    values = [float(check), float(check) ** 2, *(float(extras[n]) for n in names)]
    packed = torch.zeros(NUM_SLOTS + 2 + NUM_SAID, dtype=torch.float64)
    packed[: len(values)] = torch.tensor(values, dtype=torch.float64)
    if said:
        packed[-NUM_SAID:] = torch.tensor(said, dtype=torch.float64)
    return sent(packed.to(wide), device)


def merged_extras(names: Sequence[str], packed: NDArray[np.float64], num_ranks: int) -> dict[str, float]:
    """Return the means over ranks; nothing where ranks knew different names, which no rank may act on alone."""
    total, squares = packed[:2]
    if num_ranks * squares != total * total:
        return {}
    return {n: float(v) / num_ranks for n, v in zip(sorted(names), packed[2:-NUM_SAID], strict=False)}


def _on(value: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return moved(value, device, wide_dtype(device))
    return torch.full((), value, dtype=wide_dtype(device), device=device)


def _reduce(
    parts: dict[str, Tensor],
    reduce: Callable[[Tensor, Tensor | None], None],
    rows: Tensor | None,
    device: torch.device,
) -> None:
    names = list(parts)
    wide = wide_dtype(device)
    empty = torch.zeros(0, dtype=wide, device=device)
    flat = torch.cat([empty, *(moved(parts[n], device, wide).reshape(-1) for n in names)])
    reduce(flat, rows)
    start = 0
    for n in names:
        size = parts[n].numel()
        parts[n] = flat[start : start + size].reshape(parts[n].shape)
        start += size
