"""What a module has by name, without asking the module: users' own `__getattr__` may raise, or hand on to another."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["member", "takes_hooks"]

_SCRIPTED: Any = getattr(torch.jit, "RecursiveScriptModule", ())


def member(module: nn.Module, name: str) -> Any:
    """Return what a module or its class holds under a name (an attribute, a child, a method); None for nothing."""
    held = object.__getattribute__(module, "__dict__")
    if name in held:
        return held[name]
    children = held.get("_modules") or {}
    if name in children:
        return children[name]
    return getattr(type(module), name, None)


def takes_hooks(module: nn.Module) -> bool:
    """Return whether torch puts hooks on a module: it refuses what `torch.jit.script` has made."""
    return not isinstance(module, _SCRIPTED)
