"""Makes a record equal on all ranks, so that every decision taken from it is equal by construction.

Gradients and their norms are equal already (reduced by DDP, or whole through their shards' collectives). What differs
from rank to rank (loss, batch, activations) travels in one packed SUM all-reduce a step, and on sampled steps in one
MAX besides; every rank takes part in both, always (D1, G10).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..stats import reduce_max_, reduce_sum_

__all__ = ["BATCH_SCALARS", "combine", "is_writer", "world_size"]

# A fixed list, so that the packed vector has one layout on all ranks whatever a rank's batch could tell.
_MEANS = (
    "input_mean",
    "input_std",
    "batch_size",
    "output_units",
    "output_batch_variance",
    "target_is_integer",
    "num_classes",
    "expected_initial_loss",
    "target_entropy",
    "baseline_loss",
)
_MAXIMA = ("input_absmax", "output_max", "output_row_sum_max", "target_max", "target_row_sum_max", "shape_mismatch")
_MINIMA = ("output_min", "output_row_sum_min", "target_min", "target_row_sum_min")
BATCH_SCALARS = (*_MEANS, *_MAXIMA, *_MINIMA)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_writer() -> bool:
    """Whether this rank writes: rank zero alone does."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def combine(
    sums: dict[str, Tensor],
    maxima: dict[str, Tensor],
    scalars: Mapping[str, Tensor | float] | None,
    device: torch.device,
) -> dict[str, Tensor | float]:
    """Reduce over ranks: `sums` and `maxima` in place, the batch's scalars as means, maxima and minima.

    Args:
        sums: name -> float64 tensor, replaced by its sum over ranks.
        maxima: name -> float64 tensor, replaced by its maximum over ranks.
        scalars: of the batch, on sampled steps; None on the others.
        device: where to reduce.

    Returns:
        The batch's scalars over all ranks.
    """
    if world_size() == 1:
        return dict(scalars or {})
    if scalars is not None:
        low = float("-inf")
        sums["#values"] = torch.stack([_on(scalars.get(n, 0.0), device) for n in _MEANS])
        sums["#present"] = torch.stack([_on(float(n in scalars), device) for n in _MEANS])
        sums["#has_max"] = torch.stack([_on(float(n in scalars), device) for n in (*_MAXIMA, *_MINIMA)])
        top = [_on(scalars.get(n, low), device) for n in _MAXIMA]
        bottom = [-_on(scalars.get(n, -low), device) for n in _MINIMA]
        maxima["#extremes"] = torch.stack([*top, *bottom])
    _reduce(sums, reduce_sum_, device)
    if maxima:
        _reduce(maxima, reduce_max_, device)
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


def _on(value: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def _reduce(parts: dict[str, Tensor], reduce: object, device: torch.device) -> None:
    names = list(parts)
    flat = torch.cat([parts[n].to(device=device, dtype=torch.float64).reshape(-1) for n in names])
    reduce(flat)  # type: ignore[operator]
    start = 0
    for n in names:
        size = parts[n].numel()
        parts[n] = flat[start : start + size].reshape(parts[n].shape)
        start += size
