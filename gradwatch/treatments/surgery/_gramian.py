"""Inner products of task gradients, exact to float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gramian", "mean_over_ranks"]

# Elements converted at a time: fits a core's cache on the CPU, keeps the number of launches small on a device.
_CHUNK_CPU, _CHUNK_DEVICE = 1 << 16, 1 << 22


def gramian(grads_per_task: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Return the (k, k) inner products of k gradients, each a list over the same tensors (None: no gradient).

    Computed in float64 without a float64 copy of the gradients, so that products of tiny gradients do not underflow and
    weights do not depend on the order of the sum. Complex or sparse gradients count as their dense real elements.

    Returns:
        (k, k) float64 on the gradients' device (the first one's); zeros where there is no gradient at all.
    """
    k = len(grads_per_task)
    columns = list(zip(*grads_per_task, strict=True))
    first = next((g for column in columns for g in column if g is not None), None)
    if first is None:
        return torch.zeros(k, k, dtype=torch.float64)
    total = torch.zeros(k, k, dtype=torch.float64, device=first.device)
    chunk = _CHUNK_CPU if first.device.type == "cpu" else _CHUNK_DEVICE
    numel = max(next((g.numel() for g in column if g is not None), 0) for column in columns)
    scratch = torch.empty(k, min(chunk, max(numel, min(chunk, 1 << 12))), dtype=torch.float64, device=first.device)
    filled = 0
    for column in columns:
        for piece in _pieces(column, scratch.shape[1]):
            n = next(g.numel() for g in piece if g is not None)
            if filled + n > scratch.shape[1]:
                total += scratch[:, :filled] @ scratch[:, :filled].T
                filled = 0
            for row, g in zip(scratch, piece, strict=True):
                target = row[filled : filled + n]
                target.zero_() if g is None else target.copy_(g)
            filled += n
    return total + scratch[:, :filled] @ scratch[:, :filled].T


def _pieces(column: Sequence[Tensor | None], size: int) -> list[tuple[Tensor | None, ...]]:
    flat = [None if g is None else _flat(g) for g in column]
    numel = next((g.numel() for g in flat if g is not None), 0)
    if numel == 0:
        return []
    if numel <= size:
        return [tuple(flat)]
    return [tuple(None if g is None else g[i : i + size] for g in flat) for i in range(0, numel, size)]


def _flat(grad: Tensor) -> Tensor:
    grad = grad.detach()
    if grad.layout != torch.strided:
        grad = grad.to_dense()
    return (torch.view_as_real(grad) if grad.is_complex() else grad).reshape(-1)


def mean_over_ranks(matrix: Tensor) -> Tensor:
    """Return the mean over the default process group, the same bits on each rank; the matrix itself without one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return matrix
    matrix = matrix.clone()
    dist.all_reduce(matrix)
    return matrix / dist.get_world_size()
