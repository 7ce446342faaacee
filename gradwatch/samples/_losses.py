"""Losses sample by sample: torch's loss functions are seen as they are called, and asked once more without a mean."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["LossCall", "LossCalls", "loss_function", "matching_losses"]

_NAMES = (
    "cross_entropy",
    "nll_loss",
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "poisson_nll_loss",
    "kl_div",
)
_FUNCTIONS = {getattr(functional, name): name for name in _NAMES}
_CLOSE = 1e-3


@dataclass
class LossCall:
    """One call of a loss function: what it was given, and what it makes of each element. Of one that was found by its
    value, the function's name and how it reduces."""

    predictions: Tensor
    targets: Tensor
    each: Tensor
    ignored: int | None = None
    name: str = ""
    reduction: str = "mean"

    def by_place(self, size: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]] | None:
        """Return losses and which of them count, each of shape (B, T); None where they are not of B samples."""
        if self.each.dim() == 0 or self.each.size(0) % size:
            return None
        losses = self.each.double().reshape(size, -1).cpu().numpy()
        counts = np.ones(losses.shape, dtype=bool)
        if self.ignored is not None and self.targets.numel() == losses.size:
            counts = (self.targets != self.ignored).reshape(size, -1).cpu().numpy()
        return losses, counts


@dataclass
class LossCalls(TorchFunctionMode):
    """While it is on, keeps the calls of loss functions whose predictions ask for gradients."""

    calls: list[LossCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Asked for a dictionary, functions that can't be hashed would raise.
        if any(func is known for known in _FUNCTIONS):
            with suppress(Exception):
                self._keep(func, args, kwargs)
        return func(*args, **kwargs)

    def _keep(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        predictions, targets = given["input"], given["target"]
        if predictions.requires_grad:
            given |= {"reduction": "none"}
            given.pop("size_average", None)
            given.pop("reduce", None)
            with torch.no_grad():
                each = func(**{**given, "input": predictions.detach()})
            ignored = given.get("ignore_index", -100) if "ignore_index" in inspect.signature(func).parameters else None
            self.calls.append(LossCall(predictions, targets.detach(), each, ignored))


def matching_losses(outputs: Tensor, targets: Tensor, loss: float) -> LossCall | None:
    """Return the losses of the usual loss function whose mean, or sum, of outputs and targets is this loss.

    None where none of them comes to it.
    """
    outputs, targets = outputs.detach(), targets.detach()
    for name in _NAMES:
        with suppress(Exception):
            each = _each(name, outputs, targets)
            means = [each.double().mean(), each.double().sum()]
            if name in ("cross_entropy", "nll_loss") and not targets.is_floating_point():
                means.append(each.double().sum() / (targets != -100).sum())
            near = [abs(float(m) - loss) <= _CLOSE * max(abs(loss), 1e-6) for m in means]
            if any(near):
                ignored = -100 if name in ("cross_entropy", "nll_loss") else None
                reduction = "sum" if near[1] and not near[0] else "mean"
                return LossCall(outputs, targets, each, ignored, name, reduction)
    return None


def loss_function(name: str, reduction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return one of torch's loss functions as one of outputs and targets in whichever of the usual shapes."""

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = getattr(functional, name)(*_fitting(name, outputs, targets), reduction=reduction)
        return found

    return loss_fn


def _each(name: str, outputs: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad():
        return loss_function(name, "none")(outputs, targets)


def _fitting(name: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if name in ("cross_entropy", "nll_loss"):
        if outputs.dim() > 2 and outputs.shape[:-1] == targets.shape:
            outputs = outputs.movedim(-1, 1)
        if outputs.shape == targets.shape and not targets.is_floating_point():
            raise ValueError("classes, where scores are asked for")
    elif outputs.shape != targets.shape:
        if outputs.numel() != targets.numel():
            raise ValueError("of another shape")
        targets = targets.reshape(outputs.shape)
    return outputs, targets.to(outputs.dtype) if name.startswith("binary") else targets
