"""What wrappers put into the paths of modules and parameters."""

from __future__ import annotations

__all__ = ["WRAPPER_PARTS", "clean_path"]

WRAPPER_PARTS = frozenset(
    {"_forward_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_wrapped_module"}
)
"""Names under which Fabric, torch.compile, FSDP and activation checkpointing hold the module that they wrap."""

_PARALLEL = WRAPPER_PARTS | {"module"}


def clean_path(path: str, *, parallel: bool = False) -> str:
    """Return a path without the parts that wrappers put into it, so that curves and patterns keep their names.

    Args:
        path: of a module or a parameter.
        parallel: leave out `module` too, under which DDP and DataParallel hold theirs. Users name their own so.
    """
    parts = _PARALLEL if parallel else WRAPPER_PARTS
    if parts.isdisjoint(split := path.split(".")):
        return path
    return ".".join([part for part in split if part not in parts])
