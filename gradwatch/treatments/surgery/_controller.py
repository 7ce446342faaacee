"""The run-time side of surgery: knows the losses of the present micro-batch and what to multiply them by."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ._checks import check_losses, check_separate
from ._decide import Decider, Decision
from ._diagnosis import describe, merge
from ._direct import direct_sum
from ._gramian import mean_over_ranks, quick_gramian
from ._probe import Prober, Probes
from ._settings import Surgery
from ._split import plain_sum
from ._weigh import weigh_entries, weigh_losses

__all__ = ["SurgeryController"]


class SurgeryController:
    """Surgery and conflict diagnosis of one model during one run.

    The engine sets `step`, hands over the task losses (`begin`, or `split` inside `collecting(controller)`), announces
    the backward (`before_backward`), and cleans up after it (`after_backward`). Where nobody announces it, the sum of
    the losses does so itself as backward enters it. Between the two exactly one ordinary
    backward runs, in which each task loss multiplies its incoming gradient by its weight; a weight of 1 leaves no hook.

    Args:
        surgery: what to do; None only diagnoses.
        parameters: (path, parameter) of the model, such as `model.named_parameters()`.
        diagnose_every: at every how many optimizer steps conflicts are measured where surgery isn't due; 0 is never.
        diagnose_gramian: what for: "last" (cheap), "params" or "features".

    Attributes:
        step: optimizer steps taken so far; set by the engine.
        probing: True while per-task gradients are taken; hooks of modules and parameters fire then too, and those that
            take statistics should not.
    """

    def __init__(
        self,
        surgery: Surgery | None,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        diagnose_every: int = 0,
        diagnose_gramian: str = "last",
    ) -> None:
        if not diagnose_every >= 0:
            raise ConfigError(f"`diagnose_every` must be a number of steps >= 0. Got {diagnose_every}.")
        self.step = 0
        self.probing = False
        self._parameters = dict(parameters)
        self._diagnose_every = diagnose_every
        self._cheap = Prober(self._parameters, shared="auto", gramian=diagnose_gramian)
        self._surgery: Surgery | None = None
        self._decider: Decider | None = None
        self._prober = self._cheap
        self._pending: dict[str, Tensor] = {}
        self._direct = False
        self._is_prepared = False
        self._grad_scale = 1.0
        self._checked: set[tuple[str, ...]] = set()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._measured: list[dict[str, float]] = []
        self.switch(surgery)

    @property
    def surgery(self) -> Surgery | None:
        """What is done at present; None where conflicts are only measured."""
        return self._surgery

    def switch(self, surgery: Surgery | None) -> None:
        """Do this surgery from the next micro-batch on; None switches it off. What a method remembers starts afresh."""
        self._surgery = surgery
        self._decider = None if surgery is None else Decider(surgery)
        if surgery is not None:
            self._prober = Prober(self._parameters, shared=surgery.shared, gramian=surgery.gramian)

    def begin(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Take the task losses of this micro-batch, and return the sum to differentiate.

        Losses may come in several calls. A name that comes again begins a new micro-batch.

        Raises:
            ConfigError: a loss is no scalar, has no gradient, or is given twice.
        """
        if not self._wanted:
            return plain_sum(losses)
        if any(name in self._pending for name in losses):
            self.discard()
        if self._direct:
            raise ConfigError("combine='direct' needs all task losses of a step in one split(...) call.")
        check_losses({**self._pending, **losses})
        self._pending.update(losses)
        self._is_prepared = False
        if not (self._due and self._surgery and self._surgery.combine == "direct"):
            total = plain_sum(losses)
            if total.requires_grad:
                total.register_hook(_Begins(self))
            return total
        self._direct = True
        self._check_separate(losses)
        own = dict(losses)
        return direct_sum(own, list(self._parameters.values()), partial(self._combine_direct, own))

    def before_backward(self, loss: Tensor | None = None, *, grad_scale: float = 1.0) -> None:
        """Probe the tasks' gradients, decide the weights, and prepare the one backward that follows.

        Args:
            loss: what backward will be called on, already divided for accumulation and multiplied by the scaler. Tells
                how each task loss counts in it (`seg + 0.3 * depth`). None: each counts as it is, times `grad_scale`.
            grad_scale: what the gradients of this backward are a multiple of: the scaler's scale over the number of
                accumulated micro-batches. Norms are reported, and weights computed, without it.
        """
        self._release()
        self._is_prepared = True
        self._grad_scale = grad_scale
        if self._direct or len(self._pending) < 2 or not (self._due or self._diagnosed):
            return
        losses = self._pending
        self._check_separate(losses)
        prober = self._prober if self._due else self._cheap
        with self._probes():
            found = prober.probe(losses, _seeds(losses, loss, grad_scale))
        decision = self._decide(found, tuple(losses))
        if decision is None:
            return
        assert self._surgery is not None
        weigh = weigh_losses if self._surgery.heads == "weighted" else weigh_entries
        self._handles = weigh(list(losses.values()), decision.weights.tolist())

    def begins(self, incoming: Tensor) -> None:
        """Called in backward as it enters the sum of the losses, where no trainer has announced it.

        Args:
            incoming: the sum's gradient: what the loss was multiplied by on its way.
        """
        if self._is_prepared or self.probing or not self._pending:
            return
        scale = abs(float(incoming))  # a host read, as the Gramian is one
        self.before_backward(grad_scale=scale if 0 < scale < math.inf else 1.0)

    def after_backward(self) -> None:
        """Take every hook off and let the losses go."""
        self._release()
        self.discard()

    def discard(self) -> None:
        """Forget losses whose backward never came."""
        self._pending = {}
        self._direct = False

    def backward(self, losses: Mapping[str, Tensor], *, grad_scale: float = 1.0) -> Tensor:
        """Run the backward of the losses' sum times `grad_scale`, with surgery; return the sum, detached."""
        self.discard()
        total = self.begin(losses)
        scaled = total if grad_scale == 1 else total * grad_scale
        try:
            self.before_backward(scaled, grad_scale=grad_scale)
            scaled.backward()
        finally:
            self.after_backward()
        return total.detach()

    def report(self) -> dict[str, float]:
        """Return what was measured since the last call, by scalar name; {} where nothing was.

        Means over the step's micro-batches; a scalar that only some of them had is the mean over those.
        """
        measured, self._measured = self._measured, []
        return merge(measured)

    def close(self) -> None:
        """Leave nothing behind. May be called twice."""
        self.after_backward()

    def state_dict(self) -> dict[str, Any]:
        """Return what the method remembers, as plain values and tensors."""
        return {} if self._decider is None else self._decider.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._decider is not None:
            self._decider.load_state_dict(state)

    @property
    def replaces_loss(self) -> bool:
        """Whether backward must run through the sum that `begin` returned last, instead of any other one."""
        return self._direct

    @property
    def _due(self) -> bool:
        return self._surgery is not None and self._surgery.acts_at(self.step)

    @property
    def _diagnosed(self) -> bool:
        return self._diagnose_every > 0 and self.step % self._diagnose_every == 0

    @property
    def _wanted(self) -> bool:
        return self._due or self._diagnosed

    def _check_separate(self, losses: Mapping[str, Tensor]) -> None:
        if tuple(losses) not in self._checked:
            check_separate(losses)
            self._checked.add(tuple(losses))

    @contextmanager
    def _probes(self) -> Iterator[None]:
        self.probing = True
        try:
            yield
        finally:
            self.probing = False

    def _decide(self, found: Probes, names: tuple[str, ...]) -> Decision | None:
        """Measure the Gramian of the probes, note what it says, and return what to do about it."""
        # The one host read of surgery: k x k numbers.
        matrix = mean_over_ranks(quick_gramian(found.grads)).to("cpu", torch.float64) / self._grad_scale**2
        scalars = describe(matrix, names)
        decision = None
        if self._due and self._decider is not None:
            decision = self._decider.decide(matrix, names, step=self.step)
            scalars.update(decision.scalars)
        self._measured.append(scalars)
        return decision

    def _combine_direct(self, losses: Mapping[str, Tensor], incoming: Tensor) -> list[Tensor | None]:
        """Return the parameters' gradients of the weighted sum; runs inside backward."""
        seeds = [incoming.to(loss.dtype).expand_as(loss) for loss in losses.values()]
        with self._probes():
            found = self._prober.probe(losses, seeds, keep_all=True, free=True)
        decision = self._decide(found, tuple(losses)) if len(losses) > 1 else None
        weights = [1.0] * len(losses) if decision is None else decision.weights.tolist()
        plain_heads = self._surgery is not None and self._surgery.heads == "plain"
        return found.combine(weights, plain_heads=plain_heads)

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Begins:
    """The hook on the sum of task losses. It holds nothing: the graph holds it."""

    __slots__ = ("owner",)
    __torch_unserializable__ = True

    def __init__(self, owner: SurgeryController) -> None:
        self.owner = weakref.ref(owner)

    def __call__(self, grad: Tensor) -> None:
        owner = self.owner()
        if owner is not None:
            owner.begins(grad)


def _seeds(losses: Mapping[str, Tensor], loss: Tensor | None, grad_scale: float) -> list[Tensor]:
    """Return the gradient that arrives at each task loss in the backward to come."""
    if loss is None:
        return [torch.full_like(task_loss, grad_scale) for task_loss in losses.values()]
    seeds = torch.autograd.grad(
        loss, list(losses.values()), torch.ones_like(loss), retain_graph=True, allow_unused=True
    )
    for name, seed in zip(losses, seeds, strict=True):
        if seed is None:
            raise ConfigError(
                f"task {name!r} has no part in the loss that backward is called on: its loss must be one of the terms, "
                "not a copy, a detached value or the loss of another batch."
            )
    return list(seeds)
