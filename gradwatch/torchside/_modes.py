"""A function mode for the time of one module call, that comes off the stack on every way out."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["CallMode", "past_override"]


class _Open(threading.local):
    """The modes that this thread has on torch's stack."""

    def __init__(self) -> None:
        self.modes: list[CallMode] = []


_OPEN = _Open()


class CallMode(TorchFunctionMode):
    """Sees the torch functions that one module call makes, children's included; `seen` says what happens to each.

    Opened by a forward pre-hook and closed by a forward hook. torch calls no forward hook when the call ends in an
    exception: such a mode finds out by its frame that its call is over, acts no more, and leaves the stack as soon as
    it is on top of it.
    """

    def __init__(self, owner: object) -> None:
        super().__init__()
        self.owner = owner
        self.frame: Any = None

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the function call gives; overridden."""
        return func(*args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_over():
            return func(*args, **(kwargs or {}))
        return self.seen(func, args, kwargs or {})

    def open(self, *, above: int = 1) -> None:
        """Put the mode on the stack, for the call whose frame is so many above the caller's."""
        _clean_up()
        self.frame = sys._getframe(above + 1)
        _OPEN.modes.append(self)
        self.__enter__()

    def is_over(self) -> bool:
        """Return whether the call has ended: its frame can be cleared only then."""
        if self.frame is None:
            return True
        try:
            self.frame.clear()
        except RuntimeError:
            return False
        self.frame = None
        return True

    @staticmethod
    def close(owner: object) -> CallMode | None:
        """Take the owner's mode that was opened last off; return it, or None where there is none."""
        for mode in reversed(_OPEN.modes):
            if mode.owner is owner:
                mode.frame = None
                _clean_up()
                return mode
        return None


def _clean_up() -> None:
    """Take modes whose call is over off the stack, as far as they are on top of it."""
    modes = _OPEN.modes
    while modes and modes[-1].is_over():
        size = torch._C._len_torch_function_stack()
        if not size or torch._C._get_function_stack_at(size - 1) is not modes[-1]:
            still = any(torch._C._get_function_stack_at(i) is modes[-1] for i in range(size))
            if still:
                return
            modes.pop()
            continue
        modes.pop().__exit__(None, None, None)


def past_override(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return a torch function, written in Python, without its question whether somebody overrides it.

    Called from within an override, and with the override in force again, it would ask, and be handed back, for ever.
    """
    inner = getattr(func, "__wrapped__", func)
    if not isinstance(inner, FunctionType):
        return func
    names = {"has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"}
    globals_ = {**inner.__globals__, **dict.fromkeys(names, _nobody)}
    copied = FunctionType(inner.__code__, globals_, inner.__name__, inner.__defaults__, inner.__closure__)
    copied.__kwdefaults__ = inner.__kwdefaults__
    return copied


def _nobody(*_: Any) -> bool:
    return False
