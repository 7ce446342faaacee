"""A hook on the gradient of one tensor, also where the tensor is a view that is changed in place later.

The output of a Linear on a batch of sequences is a view of a matrix product. An in-place operation on it (a
`ReLU(inplace=True)`) rewrites the history of the *base*: the view's own node, and with it every tensor hook on the
view, drops out of the graph without a word. What still passes is the node that made the base: where nobody but the view
can have used the base, the gradient that arrives there is the view's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, nn

from ._runs import graph_task_id, untraced

__all__ = ["hook_gradient", "private_base"]

GradientFunction = Callable[[Tensor], "Tensor | None"]


@cache
def _fresh_references() -> int:
    """Return how many references a base has that no Python object refers to: a matter of the torch version."""
    with torch.enable_grad():
        product = torch.nn.functional.linear(
            torch.zeros(1, 1, 1), torch.zeros(1, 1, requires_grad=True), torch.zeros(1)
        )
    return getrefcount(product._base)


def private_base(tensor: Tensor, inputs: Iterable[Any]) -> Tensor | None:
    """Return the base of a view that only this view can have used, or None.

    That is: a base of the same size and memory order, with a node, that no Python object refers to, and that is neither
    an input of the module nor the base of one.
    """
    if not tensor._is_view():
        return None
    if getrefcount(tensor._base) > _fresh_references():
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
) -> Any:
    """Call `fn` with the gradient of a tensor, as it is now, when backward computes it; return the handle.

    Args:
        tensor: requires a gradient.
        fn: gets the gradient; what it returns replaces it. Must not hold the tensor: that would keep the graph alive.
        inputs: of the module that made it.
        module: that made it. Of a plain `nn.Linear` it is certain that nothing else used the base, and one hook does;
            elsewhere (an auxiliary loss on the base, say) the view's own hook has the first word.
        any_shape: `fn` takes the gradient in the base's shape as well, and returns None.
    """
    base = private_base(tensor, inputs)
    if base is None:
        return tensor.register_hook(fn)
    both = _ViewGradient(fn, None if any_shape else tensor.shape, base.output_nr)
    node: Any = base.grad_fn
    handle = node.register_prehook(both.at_base)
    return handle if type(module) is nn.Linear else tensor.register_hook(both)


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
