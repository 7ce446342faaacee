"""A hook on the gradient of one tensor, also where the tensor is a view that is changed in place later.

The output of a Linear on a batch of sequences is a view of a matrix product. An in-place operation on it (a
`ReLU(inplace=True)`) rewrites the history of the *base*: the view's own node, and with it every tensor hook on the
view, drops out of the graph without a word. What still passes is the node that made the base: where nobody but the view
can have used the base, the gradient that arrives there is the view's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, nn

from ..torchside import Aside, untraced
from ._runs import graph_task_id

__all__ = ["hook_gradient", "hook_view", "private_base"]

GradientFunction = Callable[[Tensor], "Tensor | None"]


def _fresh_references() -> int:
    """Return how many references a base has that no Python object refers to: a matter of the torch version."""
    with torch.inference_mode(False), Aside():
        zeros = [torch.zeros(*shape, device="cpu", dtype=torch.float32) for shape in ((1, 1, 1), (1, 1), (1,))]
        product = torch.nn.functional.linear(*zeros)
    return getrefcount(product._base)


# Found at import, before any forward of the user's could be running: an operation there, though it runs but once in a
# process, is one more than activation checkpointing will find when it repeats that forward.
_FRESH_REFERENCES = _fresh_references()


def private_base(tensor: Tensor, inputs: Iterable[Any]) -> Tensor | None:
    """Return the base of a view that only this view can have used, or None.

    That is: a base of the same size and memory order, with a node, that no Python object refers to, and that is neither
    an input of the module nor the base of one.
    """
    if not tensor._is_view():
        return None
    if getrefcount(tensor._base) > _FRESH_REFERENCES:
        return None
    base: Any = tensor._base
    if base is None or base.grad_fn is None or base.numel() != tensor.numel():
        return None
    if not (base.is_contiguous() and tensor.is_contiguous()):
        return None
    for value in inputs:
        if isinstance(value, Tensor) and value._base is base:
            return None
    return base


def hook_gradient(
    tensor: Tensor,
    fn: GradientFunction,
    inputs: Iterable[Any] = (),
    module: nn.Module | None = None,
    *,
    any_shape: bool = False,
    on_lost: Callable[[], None] | None = None,
) -> Any:
    """Call `fn` with the gradient of a tensor, as it is now, when backward computes it; return the handle.

    Args:
        tensor: requires a gradient.
        fn: gets the gradient; what it returns replaces it. Must not hold the tensor: that would keep the graph alive.
        inputs: of the module that made it.
        module: that made it. Of a plain `nn.Linear` it is certain that nothing else used the base, and one hook does;
            elsewhere (an auxiliary loss on the base, say) the view's own hook has the first word.
        on_lost: called in a backward that goes past a view which something has changed in place since, and past `fn`
            with it: the base is not the view's alone, and nothing there tells the view's gradient.
        any_shape: `fn` takes the gradient in the base's shape as well, and returns None.
    """
    base = private_base(tensor, inputs)
    if base is None:
        return tensor.register_hook(fn) if on_lost is None else hook_view(tensor, fn, on_lost)
    both = _ViewGradient(fn, None if any_shape else tensor.shape, base.output_nr)
    node: Any = base.grad_fn
    handle = node.register_prehook(both.at_base)
    return handle if type(module) is nn.Linear else tensor.register_hook(both)


def hook_view(tensor: Tensor, fn: GradientFunction, on_lost: Callable[[], None]) -> Any:
    """Call `fn` with the gradient of a tensor; or, where it is a view that was changed in place, which drops the hook,
    `on_lost` in its place."""
    base = tensor._base
    if base is None or base.grad_fn is None or not tensor.requires_grad:
        return tensor.register_hook(fn)
    watched = _WatchedView(fn, tensor, on_lost)
    base.grad_fn.register_prehook(watched.at_base)
    return tensor.register_hook(watched)


class _WatchedView:
    """Knows in a backward whether a view's hook has dropped out: by the version of its memory, held without a graph."""

    __slots__ = ("fn", "memory", "on_lost", "task", "version")
    __torch_unserializable__ = True

    def __init__(self, fn: GradientFunction, tensor: Tensor, on_lost: Callable[[], None]) -> None:
        self.fn, self.on_lost, self.task = fn, on_lost, -1
        self.memory = tensor.detach()
        self.version = self.memory._version

    @untraced
    def __call__(self, grad: Tensor | None) -> Tensor | None:
        self.task = graph_task_id()
        return None if grad is None else self.fn(grad)

    @untraced
    def at_base(self, grads: tuple[Tensor | None, ...]) -> None:
        task = graph_task_id()
        if (task == -1 or task != self.task) and self.memory._version != self.version:
            self.on_lost()


class _ViewGradient:
    """Calls a function once a backward: from the view's hook or, if that has dropped out, from the base's node."""

    __slots__ = ("fn", "output_nr", "shape", "task")
    __torch_unserializable__ = True

    def __init__(self, fn: GradientFunction, shape: torch.Size | None, output_nr: int) -> None:
        self.fn, self.shape, self.output_nr = fn, shape, output_nr
        self.task = -1

    @untraced
    def __call__(self, grad: Tensor) -> Tensor | None:
        self.task = graph_task_id()
        return self.fn(grad)

    @untraced
    def at_base(self, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        task = graph_task_id()
        grad = grads[self.output_nr]
        if grad is None or (task != -1 and task == self.task):
            return None
        new = self.fn(grad if self.shape is None else grad.reshape(self.shape))
        if new is None:
            return None
        return (*grads[: self.output_nr], new.reshape(grad.shape), *grads[self.output_nr + 1 :])
