"""Operations of ours inside a user's forward or backward: beside the graph, unseen by the user's modes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch

__all__ = ["Aside", "are_modes_on", "in_transform"]

# `torch.no_grad()` does the same and costs as much as a whole hook. All of these are private: where one is missing,
# the public way or nothing takes its place.
_set_grad_enabled: Any = getattr(torch._C, "_set_grad_enabled", torch.set_grad_enabled)
_num_function_modes: Any = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_num_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_is_autocast: Any = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_no_autocast: Any = getattr(torch._C, "_DisableAutocast", None)
_functorch: Any = getattr(torch._C, "_functorch", None)
_peek_transform: Any = getattr(_functorch, "peek_interpreter_stack", lambda: None)


def in_transform() -> bool:
    """Return whether a `torch.func` transform (grad, vmap, jvp) runs: tensors then stand for many, or for none."""
    return _peek_transform() is not None


def are_modes_on() -> bool:
    """Return whether a torch function or dispatch mode sees what is asked of tensors, their attributes too.

    What only asks, and computes nothing, needs `Aside` no more than that: autograd and autocast do not see it.
    """
    return bool(_num_function_modes() or _num_dispatch_modes())


class Aside:
    """`with Aside(): ...` runs operations that the user's training neither records, counts, casts nor redirects.

    No graph and so no saved tensor; no torch function or dispatch mode (a counter of operations or bytes, a default
    device) sees them; autocast does not round their numbers. Costs about a microsecond where none of that is on. Not
    for code of the user's, which may rely on its modes.
    """

    __slots__ = ("_entered", "_recording")

    def __enter__(self) -> None:
        self._entered: list[AbstractContextManager[Any]] | None = None
        # First: switching gradients off is a call that a mode of functions would see.
        if _num_function_modes() or _num_dispatch_modes() or _is_autocast():
            self._leave_modes()
        self._recording = torch.is_grad_enabled()
        if self._recording:
            _set_grad_enabled(False)

    def _leave_modes(self) -> None:
        contexts: list[AbstractContextManager[Any]] = []
        if _num_function_modes():
            contexts.append(torch._C.DisableTorchFunction())
        if _num_dispatch_modes():
            from torch.utils._python_dispatch import _disable_current_modes

            contexts.append(_disable_current_modes())
        if _no_autocast is not None and _is_autocast():
            contexts.append(_no_autocast())
        self._entered = []
        for context in contexts:
            context.__enter__()
            self._entered.append(context)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._recording:
            _set_grad_enabled(True)
        while self._entered:
            self._entered.pop().__exit__(None, None, None)
