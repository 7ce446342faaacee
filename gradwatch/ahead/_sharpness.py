"""The largest curvature of the loss, against what the learning rate bears."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from ..errors import ConfigError
from ..records import SCALAR, Column, add_column
from ..torchside import untouched
from ._ways import OPTIONS, STATES, Way, way_of

__all__ = ["Sharpness", "sharpness"]

for _name, _meaning in (
    ("sharpness", "Largest eigenvalue of the loss’s Hessian (under Adam: preconditioned), by power iteration."),
    ("sharpness_limit", "The sharpness above which a step with this learning rate goes beyond the valley."),
):
    add_column(Column(name=_name, kind=SCALAR, meaning=_meaning, when="as often as it is handed over"))


@dataclass(frozen=True)
class Sharpness:
    """The largest curvature along a direction.

    Attributes:
        value: of the Hessian's eigenvalues, the one of largest magnitude; under Adam, RMSprop and their kin of the
            Hessian between two roots of the preconditioner, sqrt(second moment) + eps.
        limit: above it steps go beyond the valley: 2 (1 + momentum) / lr for gradient descent and RMSprop, with
            Nesterov's momentum divided by 1 + 2 momentum (Cohen et al., arXiv 2103.00065), 2 (1 + beta1) / ((1 - beta1)
            lr) under Adam (arXiv 2207.14484); nan without an optimizer, for one that is none of these, or under Adam
            before its first step.
        error: of the last two iterations, relative: how far the value had settled.
        num_iterations: products with the Hessian.
    """

    value: float
    limit: float
    error: float
    num_iterations: int

    @property
    def share(self) -> float:
        """Value over limit: at 1 lies the edge of stability."""
        return self.value / self.limit

    @property
    def scalars(self) -> dict[str, float]:
        """For `watch.record(**sharpness(...).scalars)`."""
        found = {"sharpness": self.value, "sharpness_limit": self.limit}
        return {name: value for name, value in found.items() if not math.isnan(value)}


def sharpness(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    optimizer: Optimizer | None = None,
    iterations: int = 20,
    tolerance: float = 0.01,
) -> Sharpness:
    """Return the largest curvature of the loss of a batch at the present weights.

    By power iteration with Hessian-vector products: each takes about two training steps. Gradients, buffers and random
    states are afterwards what they were; each product runs under the same random numbers (dropout). Waits for the
    device.

    Args:
        model: in the mode in which it is to be looked at.
        loss_fn: `loss_fn(model, batch)` gives one number with a graph that can be differentiated twice.
        batch: handed to `loss_fn`.
        optimizer: that trains the model; for the limit, and for Adam's preconditioner.
        iterations: at the most.
        tolerance: relative change of the value at which it is left.

    Raises:
        ConfigError: no parameter requires a gradient, or the loss is not one number with a graph.
    """
    if iterations < 1:
        raise ConfigError(f"sharpness: `iterations` is at least 1. Got {iterations}.")
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ConfigError("sharpness: no parameter of the model requires a gradient.")
    ways = [] if optimizer is None else _ways(params, optimizer)
    roots = _roots(ways, params)
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(saved_tensors_hooks(Tensor.detach, lambda tensor: tensor))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused ones can't be differentiated twice
        grads = _gradients(loss_fn(model, batch), params)
        value, error, count = _largest(params, grads, roots, iterations, tolerance)
    return Sharpness(value, math.nan if optimizer is None else _limit(ways, optimizer), error, count)


def _gradients(loss: Any, params: Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        said = (
            f"{type(loss).__name__} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        )
        raise ConfigError(f"sharpness: `loss_fn(model, batch)` gives one number that has a graph. Got {said}.")
    grads = torch.autograd.grad(loss.reshape(()), params, create_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]


def _largest(
    params: Sequence[Tensor], grads: list[Tensor], roots: list[Tensor] | None, iterations: int, tolerance: float
) -> tuple[float, float, int]:
    vector = _begin(params)
    value, error = math.nan, math.inf
    for count in range(1, iterations + 1):
        turned = vector if roots is None else [v * r for v, r in zip(vector, roots, strict=True)]
        product = _product(params, grads, turned)
        product = product if roots is None else [v * r for v, r in zip(product, roots, strict=True)]
        last, value = value, float(_dot(vector, product))
        length = math.sqrt(float(_dot(product, product)))
        error = abs(value - last) / abs(value) if value and count > 1 else math.inf
        if error < tolerance or not 0 < length < math.inf:
            break
        vector = [v / length for v in product]
    return value, error, count


def _product(params: Sequence[Tensor], grads: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
    live = [(g, v) for g, v in zip(grads, vector, strict=True) if g.requires_grad]
    if not live:
        return [torch.zeros_like(p) for p in params]
    found = torch.autograd.grad(
        [g for g, _ in live], params, [v for _, v in live], retain_graph=True, allow_unused=True
    )
    return [torch.zeros_like(p) if h is None else h.detach() for p, h in zip(params, found, strict=True)]


def _begin(params: Sequence[Tensor]) -> list[Tensor]:
    """Return a random direction of length 1, the same each time; the user's random numbers are not drawn on."""
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in params]
    length = math.sqrt(float(_dot(vector, vector)))
    return [v / length for v in vector]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x.double() * y.double()).sum().cpu() for x, y in zip(a, b, strict=True)]).sum()


def _ways(params: Sequence[Tensor], optimizer: Optimizer) -> list[Way | None]:
    """Return how each parameter is stepped, None for those that have not been; nothing where that is not known."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found: list[Way | None] = []
    for p in params:
        state, group = optimizer.state.get(p, {}), groups.get(id(p), {})
        held = {name: state.get(name) for name in STATES} | {name: group.get(name) for name in OPTIONS}
        found.append(way_of(held))
        if found[-1] is None and state:
            return []
    return found


def _roots(ways: Sequence[Way | None], params: Sequence[Tensor]) -> list[Tensor] | None:
    """Return one over the root of the preconditioner for each parameter; None where there is none."""
    if all(way is None or way.moment is None for way in ways):
        return None
    return [
        torch.ones_like(p) if way is None or way.moment is None else way.metric(way.moment).rsqrt()
        for way, p in zip(ways, params, strict=True)
    ]


def _limit(ways: Sequence[Way | None], optimizer: Optimizer) -> float:
    known = [way.most for way in ways if way is not None]
    rate = max(float(group["lr"]) for group in optimizer.param_groups)
    return math.nan if not known else max(known) / rate if rate > 0 else math.inf
