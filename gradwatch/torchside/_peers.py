"""How many ranks take part in the run."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

__all__ = ["are_several", "world_size"]

# `dist.is_initialized` asks through three properties, and this is asked several times at every step. Private: where it
# is missing, the public way is gone.
_WORLD: Any = getattr(getattr(dist, "distributed_c10d", None), "_world", None)
_IS_AVAILABLE = dist.is_available()


def are_several() -> bool:
    """Return whether there is a process group at all; it may be of one rank."""
    try:
        return _WORLD._default_pg is not None
    except AttributeError:
        return _IS_AVAILABLE and dist.is_initialized()


def world_size() -> int:
    """Return the number of ranks; 1 where there is no process group."""
    return dist.get_world_size() if _IS_AVAILABLE and dist.is_initialized() else 1
