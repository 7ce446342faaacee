"""How ranks share the work: which see batches of their own, and which only hold other pieces of the same layers."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..torchside import Pipeline
from ._ranks import world_size

__all__ = ["num_batches_at_once"]


def num_batches_at_once(model: nn.Module, params: Iterable[Tensor]) -> int:
    """Return how many ranks work on batches of their own: all of them, but for tensor parallelism, and pipelines, whose
    ranks share theirs.

    Ranks along a mesh dimension that parameters are distributed over, and that `fully_shard` does not own, work on the
    same batch: their losses and samples are the same, and must not be counted twice.
    """
    ranks = world_size()
    if isinstance(model, Pipeline):
        ranks //= model.num_ranks
    tensor_module = sys.modules.get("torch.distributed.tensor")
    if ranks == 1 or tensor_module is None:
        return ranks
    # By the ranks in them: equal meshes, made at different times, have process groups of different names.
    groups = {g for p in params if isinstance(p, tensor_module.DTensor) for g in _groups(p.device_mesh)}
    own = {g for module in model.modules() for g in _data_groups(module)}
    return ranks // math.prod(len(g) for g in groups - own)


def _groups(mesh: Any) -> list[tuple[int, ...]]:
    """Return the ranks that this one is joined with along each dimension of a mesh."""
    return [tuple(dist.get_process_group_ranks(mesh.get_group(dim))) for dim in range(mesh.ndim)]


def _data_groups(module: Any) -> list[tuple[int, ...]]:
    """Return the ranks over which `fully_shard` splits batches for this module."""
    get_state = getattr(type(module), "_get_fsdp_state", None)
    if get_state is None:
        return []
    # Private, and guarded: without it only counts of samples are too small.
    state = get_state(module)
    found = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    meshes = [getattr(getattr(group, "mesh_info", None), "mesh", None) for group in found]
    return [ranks for mesh in meshes if mesh is not None for ranks in _groups(mesh)]
