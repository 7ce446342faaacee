"""The moment between a backward pass and what a trainer does with its gradients, where it is not announced."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["BackwardEnd", "Pass"]


class _Inert:
    """What the hook becomes in a copied or unpickled model: nothing (H14)."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass
class Pass:
    """One training forward of the model and the backward that followed.

    Attributes:
        batch: the keyword arguments of the forward, or its positional ones.
        outputs: what the model returned.
        loss: the `loss` in the outputs, detached; None where the loss is computed outside of the model.
        weight: what the loss was multiplied by on its way to backward (1 / accumulation, a loss scaler's scale): its
            gradient, a 0-dim tensor.
    """

    batch: Any
    outputs: Any
    loss: Tensor | None = None
    weight: Tensor | None = None


class BackwardEnd:
    """Calls `on_end(pass)` when the backward of a training forward has run to its end, in the same thread.

    A forward hook puts a tensor hook on the loss (else on the outputs); when it fires, backward has begun, and autograd
    is asked to call back when it is over. That is after the reduction over ranks, whose callbacks were queued during
    the same backward, and before any clip. No bit of the training is changed (H2, B1).

    Args:
        model: whose training forwards are seen.
        on_end: called once per backward.
    """

    def __init__(self, model: nn.Module, on_end: Callable[[Pass], None]) -> None:
        self._on_end = on_end
        self._handle = model.register_forward_hook(_Hook(self), with_kwargs=True)

    def close(self) -> None:
        self._handle.remove()

    def forward(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        seen = Pass(batch=dict(kwargs) or args, outputs=outputs)
        loss = outputs if isinstance(outputs, Tensor) and outputs.ndim == 0 else _loss(outputs)
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
            seen.loss = loss.detach()
            loss.register_hook(lambda grad: self._begun(seen, grad))
            return
        hooked = next((t for t in tree_leaves(_plain(outputs)) if isinstance(t, Tensor) and t.requires_grad), None)
        if hooked is not None:
            hooked.register_hook(lambda grad: self._begun(seen, None))

    def _begun(self, seen: Pass, weight: Tensor | None) -> None:
        seen.weight = None if weight is None else weight.detach()
        # Twice around: those who queued theirs during this backward (DDP's reduction) come before the second.
        _call_at_end(lambda: _call_at_end(lambda: self._on_end(seen)))


class _Hook:
    """Holds its owner weakly, and is inert on copies of the model."""

    def __init__(self, owner: BackwardEnd) -> None:
        self._owner = weakref.ref(owner)

    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        owner = self._owner()
        if owner is not None:
            owner.forward(module, args, kwargs, outputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()


def _call_at_end(call: Callable[[], None]) -> None:
    # The way in which DDP and FSDP learn that a backward is over.
    torch.autograd.Variable._execution_engine.queue_callback(call)


def _loss(outputs: Any) -> Any:
    return outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)


def _plain(outputs: Any) -> Any:
    return dict(outputs) if isinstance(outputs, Mapping) else outputs
