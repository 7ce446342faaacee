"""Functions that torch.compile leaves alone, and forwards that are run to be written down."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch.compiler import is_compiling

__all__ = ["is_traced", "uncompiled", "untraced"]

Function = TypeVar("Function", bound=Callable[..., Any])
_is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", lambda: False)


def is_traced() -> bool:
    """Return whether torch writes down what runs here (`torch.compile`, `torch.export`, `torch.jit.trace`): operations
    of ours would stand in the user's program."""
    return is_compiling() or _is_tracing()


def untraced(fn: Function) -> Function:
    """Keep torch.compile from tracing into a function: the graph breaks there, and it runs as it always does.

    `torch.compiler.disable` does the same by a wrapper, which would cost each call as much as a whole hook, and imports
    the compiler. The names are private; where they are missing, torch.compile traces what it can.
    """
    fn._torchdynamo_disable = True  # type: ignore[attr-defined]
    return uncompiled(fn)


def uncompiled(fn: Function) -> Function:
    """Keep torch.compile from compiling a function that is called in the midst of the user's compiled program, by
    autograd or by a module that is not compiled. Where the program's own trace leads into it, it is traced.
    """
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    with suppress(AttributeError, TypeError):
        if hasattr(frames, "set_code_exec_strategy"):
            strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
            frames.set_code_exec_strategy(fn.__code__, strategy)
        else:  # torch 2.6
            frames.skip_code(fn.__code__)
    return fn
