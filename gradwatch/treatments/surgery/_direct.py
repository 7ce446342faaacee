"""A sum whose gradient is put together from one pass per task, instead of a pass over the sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._split import plain_sum

__all__ = ["direct_sum"]

Combine = Callable[[Tensor], Sequence[Tensor | None]]


class _Direct(torch.autograd.Function):
    """Value of the sum; its inputs are the parameters, so that autograd accumulates (and DDP reduces) as always."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, combine: Combine, *parameters: Tensor) -> Tensor:
        ctx.combine = combine
        ctx.set_materialize_grads(False)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        combine, ctx.combine = ctx.combine, None
        (gradient,) = incoming
        if gradient is None:
            return (None, None, *([None] * (len(ctx.needs_input_grad) - 2)))
        if combine is None:
            raise RuntimeError("backward through directly combined task losses is possible once only.")
        return (None, None, *combine(gradient))


def direct_sum(losses: Mapping[str, Tensor], parameters: Sequence[Tensor], combine: Combine) -> Tensor:
    """Return the sum of the losses; backward through it gives the parameters what `combine(incoming)` returns.

    `combine` returns one gradient, or None, for each parameter.
    """
    value = plain_sum({name: loss.detach() for name, loss in losses.items()})
    return _Direct.apply(value, combine, *parameters)
