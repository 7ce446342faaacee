"""One Gramian for all ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

__all__ = ["mean_over_ranks", "num_ranks"]


def num_ranks() -> int:
    """Return the size of the default process group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(matrix: Tensor) -> Tensor:
    """Return the mean over the default process group, the same bits on each rank; the matrix itself without one."""
    if num_ranks() == 1:
        return matrix
    matrix = matrix.clone()
    dist.all_reduce(matrix)
    return matrix / num_ranks()
