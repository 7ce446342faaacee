"""The door for those who call it themselves: a model, a loss function and a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnknownNameError
from ..torchside import map_tensors, tensors_of, untouched
from ._apart import Begun, take_apart
from ._result import PerSample

__all__ = ["per_sample_gradients"]

METHODS = ("auto", "func")


def per_sample_gradients(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    *,
    method: str = "auto",
) -> PerSample:
    """Return the loss and the gradient norm of every sample of a batch, and its share in the batch's gradient.

    Nothing is left behind: `.grad`, buffers and the random state are as before, bit for bit.

    ```python
    found = gradwatch.samples.per_sample_gradients(model, F.cross_entropy, x, y)
    print(*found.top(3), sep="\\n")
    ```

    Args:
        model: called as `model(inputs)`, `model(*inputs)` of a tuple or a list, `model(**inputs)` of a mapping.
        loss_fn: takes the model's outputs and the targets; returns one number.
        inputs: whose tensors hold the B samples along their first dimension.
        targets: the same.
        method: `"auto"`: from the graph of one forward and two backward passes, the second to check the first; where
            less than 90 % of the gradient's square is told apart (compiled models, operations that are not known) by
            halving the batch. `"func"`: `torch.func.vmap` of `torch.func.grad`, which holds all B gradients at once,
            and knows neither batch normalisation nor random numbers that are the same as in training.

    Raises:
        ConfigError: there are no B samples, or the loss is not one number.
        ValueError: nothing can be told apart.
    """
    if method not in METHODS:
        raise UnknownNameError("`method`", method, METHODS)
    size = next((t.size(0) for _, t in tensors_of(inputs, objects=True) if t.dim()), 0)
    if not size:
        raise ConfigError(f"`inputs` must hold tensors of samples. Got {type(inputs).__name__} without one.")
    params = [p for p in model.parameters() if p.requires_grad]
    with untouched(model):
        if method == "func":
            return _by_func(model, loss_fn, inputs, targets, size)
        return take_apart(model, lambda: _begun(loss_fn(_call(model, inputs), targets)), params, size)


def _begun(loss: Any) -> Begun:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ConfigError(f"`loss_fn` must return one number, the loss of the whole batch. Got a tensor {shape}.")
    return Begun([loss.reshape(())], [None])


def _call(model: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _by_func(model: nn.Module, loss_fn: Any, inputs: Any, targets: Any, size: int) -> PerSample:
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss_of(values: dict[str, Tensor], x: Any, y: Any) -> Tensor:
        x, y = (map_tensors(tree, lambda t, leaf: t.unsqueeze(0)) for tree in (x, y))
        args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, (tuple, list)) else (x,), {})
        found: Tensor = loss_fn(torch.func.functional_call(model, values, tuple(args), kwargs), y)
        return found

    each = torch.func.vmap(torch.func.grad_and_value(loss_of), in_dims=(None, 0, 0), randomness="different")
    grads, losses = each(params, inputs, targets)
    whole = torch.func.grad(lambda v: loss_fn(torch.func.functional_call(model, v, *_as_args(inputs)), targets))(params)
    return _projected(list(grads.values()), list(whole.values()), losses, size)


def _as_args(inputs: Any) -> tuple[Any, ...]:
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs),) if isinstance(inputs, (tuple, list)) else ((inputs,),)


def _projected(grads: Sequence[Tensor], whole: Sequence[Tensor], losses: Tensor, size: int) -> PerSample:
    rows = torch.cat([g.reshape(size, -1) for g in grads], 1).double()
    total = torch.cat([g.reshape(-1) for g in whole]).double()
    # Divided by the batch size, where the loss is a mean.
    rows = rows * ((rows.sum(0) @ total) / rows.sum(0).square().sum())
    dots, norms = (rows @ total).cpu().numpy(), rows.norm(dim=1).cpu().numpy()
    with np.errstate(all="ignore"):
        return PerSample(
            share=dots / dots.sum(),
            norm=norms,
            cosine=dots / (norms * float(total.norm())),
            loss=losses.detach().double().cpu().numpy(),
            is_finite=np.isfinite(norms),
            projection=dots,
            method="func",
        )
