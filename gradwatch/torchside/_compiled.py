"""Which modules torch.compile has taken, from within the model or from outside."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from ._members import member

__all__ = ["compiled_parts", "is_within"]

_wrappers: tuple[int, list[weakref.ref[Any]]] = (-1, [])


def compiled_parts(model: nn.Module) -> list[str]:
    """Return the paths of modules that torch.compile has taken, by wrapping or in place; `""` where the whole model, or
    something that it is part of, was wrapped elsewhere."""
    outside = {id(part) for wrapped in _wrapped() for part in wrapped.modules()}
    if id(model) in outside:
        return [""]
    return [
        path
        for path, module in model.named_modules()
        if id(module) in outside
        or any(member(module, name) is not None for name in ("_orig_mod", "_compiled_call_impl"))
    ]


def is_within(path: str, compiled: Iterable[str]) -> bool:
    """Return whether a module's path lies in one of the compiled parts."""
    return any(part in ("", path) or path.startswith(part + ".") for part in compiled)


def _wrapped() -> list[nn.Module]:
    """Return the modules that live wrappers of torch.compile hold.

    A module does not know of the wrapper around it: the wrappers are looked for among all objects, once for each number
    of frames compiled so far, and not at all where nothing was.
    """
    global _wrappers
    frames = sys.modules.get("torch._dynamo.eval_frame")
    utils = sys.modules.get("torch._dynamo.utils")
    compiled = sum(getattr(utils, "counters", {}).get("frames", {}).values()) if utils is not None else 0
    kind = getattr(frames, "OptimizedModule", None)
    if not compiled or kind is None:
        return []
    if _wrappers[0] != compiled:
        _wrappers = (compiled, [weakref.ref(o) for o in gc.get_objects() if issubclass(type(o), kind)])
    held = [ref() for ref in _wrappers[1]]
    inner = [member(wrapper, "_orig_mod") for wrapper in held if wrapper is not None]
    return [module for module in inner if isinstance(module, nn.Module)]
