"""Activation checkpointing as torch does it: which checkpoints the present forward lies in, and whether it is a repeat.

Torch offers no way to ask. What is looked for is the object that holds the function which backward will run again: the
frame of a checkpoint without reentrant autograd (its `recompute_fn`), the context of one with it (`run_function`).
Nothing of them is called; where torch names them otherwise, nothing is found.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

__all__ = ["checkpoints_around", "in_recomputation", "may_be_checkpointed"]

_MODULE = "torch.utils.checkpoint"
_REPEATS = frozenset({"backward", "unpack_hook"})
# Torch 2.6 has none: there every forward may be checkpointed, and the frames tell.
_top_hooks: Any = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)


def may_be_checkpointed(recording: bool) -> bool:
    """Return whether the present forward may lie in a checkpoint: a quick look, which errs on the side of yes.

    Args:
        recording: whether gradients were on when the model was called; with reentrant autograd they are off inside.
    """
    return _top_hooks is None or (recording and not torch.is_grad_enabled()) or _top_hooks(False) is not None


def checkpoints_around() -> list[tuple[Any, str]]:
    """Return the checkpoints that this thread is in the (first or repeated) forward of: each an object, and the name of
    its attribute that holds the function to be run again."""
    found: dict[int, tuple[Any, str]] = {}

    def add(holder: Any, name: str) -> None:
        if holder is not None and callable(getattr(holder, name, None)):
            found.setdefault(id(holder), (holder, name))

    top = None if _top_hooks is None else _top_hooks(False)
    add(_cell(top[0], "frame") if top else None, "recompute_fn")
    caller: Any = sys._getframe(1)
    while caller is not None:
        if caller.f_globals.get("__name__") == _MODULE:
            name = caller.f_code.co_name
            if name in _REPEATS:
                break
            if name == "forward":
                add(caller.f_locals.get("ctx"), "run_function")
            else:  # `checkpoint`, or what it calls in later torches
                held = getattr(caller.f_locals.get("gen"), "gi_frame", None)
                add(None if held is None else held.f_locals.get("new_frame"), "recompute_fn")
        caller = caller.f_back
    return list(found.values())


def in_recomputation() -> bool:
    """Return whether torch's checkpointing is running a forward again, in this thread."""
    caller: Any = sys._getframe(1)
    while caller is not None:
        if caller.f_code.co_name in _REPEATS and caller.f_globals.get("__name__") == _MODULE:
            return True
        caller = caller.f_back
    return False


def _cell(function: Any, name: str) -> Any:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for known, cell in zip(names, getattr(function, "__closure__", None) or (), strict=False):
        if known == name:
            return cell.cell_contents
    return None
