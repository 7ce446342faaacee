"""The moment between a backward pass and what a trainer does with its gradients, where it is not announced."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..torchside import Aside, WeakHook, find, graph_task_id, tensors_of, untraced

__all__ = ["BackwardEnd", "Pass"]


@dataclass
class Pass:
    """What is kept of one training forward of the model until its backward is over. Nothing of its graph, its batch or
    its outputs: a trainer may let go of these long before, and of a forward without a backward too.

    Attributes:
        seen: what `look` made of the forward.
        loss: the `loss` in the outputs, detached; None where the loss is computed outside of the model.
        num_backwards: how many backwards have run through it, the present one included.
        weight: what the loss was multiplied by on its way to backward (1 / accumulation, a loss scaler's scale): its
            gradient, a 0-dim tensor.
    """

    seen: Any = None
    loss: Tensor | None = None
    weight: Tensor | None = None
    num_backwards: int = 0


class BackwardEnd:
    """Calls `on_end(pass)` when the backward of a training forward has run to its end, in the same thread.

    A forward hook puts a tensor hook on the loss (else on the outputs); when it fires, backward has begun, and autograd
    is asked to call back when it is over. That is after the reduction over ranks, whose callbacks were queued during
    the same backward, and before any clip. No bit of the training is changed.

    Args:
        model: whose training forwards are seen.
        on_end: called once per backward.
        look: called at the end of each training forward with its batch (the keyword arguments, or the positional ones)
            and its outputs; what it returns must not hold either.

    Attributes:
        is_muted: asked in forward and backward: a probe of ours runs, which is none of the training's.
    """

    def __init__(
        self, model: nn.Module, on_end: Callable[[Pass], None], look: Callable[[Any, Any], Any] | None = None
    ) -> None:
        self._on_end, self._look = on_end, look
        self.is_muted: Callable[[], bool] = lambda: False
        self._begun: tuple[int, int] | None = None
        self._handle = WeakHook.of(self.forward).hang(model.register_forward_hook, with_kwargs=True)

    def close(self) -> None:
        self._handle.remove()

    def forward(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        if not (module.training and torch.is_grad_enabled()) or self.is_muted():
            return
        with Aside():
            self._place(dict(kwargs) or args, outputs)

    def _place(self, batch: Any, outputs: Any) -> None:
        loss = outputs if issubclass(type(outputs), Tensor) and outputs.ndim == 0 else find(outputs, "loss")
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
            loss = None
        # The others too: a trainer may make a loss of its own from what the model gives.
        leaves = {id(t): t for _, t in tensors_of(outputs, objects=True) if t.requires_grad}
        hooked = [t for t in leaves.values() if t is not loss]
        if loss is None and not hooked:
            return
        this = Pass() if self._look is None else Pass(self._look(batch, outputs))
        if loss is not None:
            this.loss = loss.detach().clone()
        # A tensor holds its hooks, through C++ where no garbage collector looks: these must not hold the tensor.
        if loss is not None:
            loss.register_hook(_Begun(self, this, weigh=True))
        for tensor in hooked:
            tensor.register_hook(_Begun(self, this, weigh=False))

    def begun(self, this: Pass) -> None:
        """Called in backward, perhaps by several tensors: ask once to be told when it is over."""
        key = graph_task_id(), id(this)
        if key == self._begun:
            return
        self._begun = key
        this.num_backwards += 1
        # Twice around: those who queued theirs during this backward (DDP's reduction) come before the second.
        told = untraced(lambda: self._on_end(this))
        _call_at_end(partial(_call_at_end, told))


class _Begun:
    """The hook on a loss or output tensor: says that its backward has begun."""

    __slots__ = ("owner", "this", "weigh")
    __torch_unserializable__ = True

    def __init__(self, owner: BackwardEnd, this: Pass, *, weigh: bool) -> None:
        self.owner, self.this, self.weigh = weakref.ref(owner), this, weigh

    @untraced
    def __call__(self, grad: Tensor) -> None:
        owner = self.owner()
        if owner is None or owner.is_muted():
            return
        if self.weigh:
            with Aside():
                self.this.weight = grad.detach().clone()
        owner.begun(self.this)


def _call_at_end(call: Callable[[], None]) -> None:
    # The way in which DDP and FSDP learn that a backward is over.
    torch.autograd.Variable._execution_engine.queue_callback(call)
