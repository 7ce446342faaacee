"""How ranks share the work: which see batches of their own, and which only hold other pieces of the same layers."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ._ranks import world_size

__all__ = ["num_batches_at_once"]


def num_batches_at_once(model: nn.Module, params: Iterable[Tensor]) -> int:
    """Return how many ranks work on batches of their own: all of them, but for tensor parallelism.

    Ranks along a mesh dimension that parameters are distributed over, and that `fully_shard` does not own, work on the
    same batch: their losses and samples are the same, and must not be counted twice.
    """
    ranks = world_size()
    tensor_module = sys.modules.get("torch.distributed.tensor")
    if ranks == 1 or tensor_module is None:
        return ranks
    sizes: dict[str, int] = {}
    for p in params:
        if isinstance(p, tensor_module.DTensor):
            mesh = p.device_mesh
            for dim in range(mesh.ndim):
                sizes[mesh.get_group(dim).group_name] = mesh.size(dim)
    own = {name for module in model.modules() for name in _data_groups(module)}
    return ranks // math.prod(size for name, size in sizes.items() if name not in own)


def _data_groups(module: Any) -> list[str]:
    """Return the names of the process groups over which `fully_shard` splits batches for this module."""
    state = getattr(module, "_get_fsdp_state", None)
    if state is None:
        return []
    # Private, and guarded: without it losses and samples are right as long as there is no tensor parallelism.
    group = getattr(state(), "_fsdp_param_group", None)
    mesh = getattr(getattr(group, "mesh_info", None), "mesh", None)
    return [] if mesh is None else [mesh.get_group(dim).group_name for dim in range(mesh.ndim)]
