"""The two kinds of hook function, as classes: one that only looks, one that may change what it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ._hook import HookContext
    from ._points import Point

__all__ = ["HookFunction", "Intervention", "Observer"]

HookFunction = Callable[..., Any]
"""`fn(tensor, point) -> None | tensor`; with `raw=True` `fn(raw_call, point)`."""


class _Function:
    """What observers and interventions share: a function or an overridden method, metadata, a context.

    Attributes:
        metadata: whatever the author wants to keep with it.
        context: of the hook it was added with last: manager, model, store, other hooks. None before.
    """

    def __init__(self, fn: HookFunction | None = None, **metadata: Any) -> None:
        self.fn = fn
        self.metadata = metadata
        self.context: HookContext | None = None

    def reset(self) -> None:
        """Forget what was gathered. Overridden by those that gather."""

    def _apply(self, tensor: Tensor, point: Point) -> Any:
        if self.fn is None:
            raise NotImplementedError(f"{type(self).__name__} needs a function, or a method of its own.")
        return self.fn(tensor, point)


class Observer(_Function):
    """Only looks. What it returns is dropped, it records no graph, and a change in place is an error.

    Activation checkpointing runs the forward twice: an observer is not shown the second run, so its counts are right
    (`add(..., recompute=True)` shows it). Give a function, or override `observe`:

    Example:
        >>> class Largest(Observer):
        ...     value = 0.0
        ...     def observe(self, tensor, point):
        ...         self.value = max(self.value, tensor.abs().max().item())
        ...     def reset(self):
        ...         self.value = 0.0
    """

    def observe(self, tensor: Tensor, point: Point) -> Any:
        return self._apply(tensor, point)

    def __call__(self, tensor: Tensor, point: Point) -> None:
        self.observe(tensor, point)


class Intervention(_Function):
    """May change what it sees, by returning a tensor of the same shape, dtype and device; None changes nothing.

    Runs again where activation checkpointing recomputes the forward (`point.is_recompute`), since the recomputed values
    must be those of the first run: an intervention that draws random numbers draws them from (step, call).
    """

    def intervene(self, tensor: Tensor, point: Point) -> Tensor | None:
        result: Tensor | None = self._apply(tensor, point)
        return result

    def __call__(self, tensor: Tensor, point: Point) -> Tensor | None:
        return self.intervene(tensor, point)
