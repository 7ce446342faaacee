"""A veto that is decided on the device, and proven there: nobody waits for the one nor for the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from ..torchside import Aside, Samples, moved, unlike
from ._family import Family
from ._transfer import Transfer
from ._veto import Proof

__all__ = ["DeviceVeto", "LateProof", "can_decide_on_device"]

_READ_FOUND_INF = (SGD, Adam, AdamW, Adagrad)


def can_decide_on_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer is known to move nothing where `found_inf` is set: torch's own, fused.

    Others set the flag that says so, and ignore it. A fused SGD with momentum allocates its buffers uninitialised at
    its first step, and leaves them so where it moves nothing: it is asked from the second step on.
    """
    if type(optimizer) not in _READ_FOUND_INF or hasattr(optimizer, "found_inf"):
        return False
    if not all(group.get("fused") for group in optimizer.param_groups):
        return False
    return type(optimizer) is not SGD or not any(
        group["momentum"] and p.grad is not None and optimizer.state.get(p, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        for p in group["params"]
    )


class LateProof:
    """Whether a step moved something that the device had vetoed: a number on its way to the host.

    Args:
        family: the optimizers whose step it was.
        moved: 0-dim bool tensor.
    """

    def __init__(self, family: Family, moved: Tensor) -> None:
        self._family = family
        self._numbers = Transfer({"moved": moved})

    @property
    def ready(self) -> bool:
        """Whether `result()` returns without a wait."""
        return self._numbers.ready

    def result(self) -> Proof:
        """Return what came of it. The optimizer is asked no more where it moved: its steps wait for vetoes then."""
        name = self._family.name
        if not bool(self._numbers.result()["moved"]):
            return Proof(name)
        self._family.learned = True
        what = ("weights or their state",)
        return Proof(name, what, what, "it was asked on the device to move nothing. From now on its steps wait")


class DeviceVeto:
    """Lets a fused optimizer decide for itself, from a flag on the device: it moves nothing where `found_inf` is set,
    as it does under a loss scaler.

    Whether it kept to that is looked at on the device, too: at each such step some elements of every parameter, and of
    every tensor that it remembers, are compared bit for bit with what they were.

    Args:
        optimizer: a torch one.
        family: all that write its parameters.

    Attributes:
        is_armed: it decides at the step to come.
    """

    def __init__(self, optimizer: Optimizer, family: Family) -> None:
        self._optimizer, self._family = optimizer, family
        self._flag: Tensor | None = None
        self.is_armed = False
        self._samples: Samples | None = None
        self._before: list[Tensor] = []
        self._tell: Callable[[LateProof], object] = lambda proof: None

    def arm(self, veto: Tensor, tell: Callable[[LateProof], object]) -> None:
        """Set the flag of the step to come; `tell` gets the proof when that is over."""
        self._flag, self._tell, self.is_armed = veto.reshape(()), tell, True

    def begin(self) -> None:
        """Hand the flag over: the optimizer moves next."""
        assert self._flag is not None
        with Aside():
            vars(self._optimizer).update(found_inf=self._flag.to(torch.float32), grad_scale=None)
        held = _held(self._optimizer)
        if self._samples is None or not self._samples.are_of(held):
            self._samples = Samples(held)
        self._before = self._samples.now()

    def end(self) -> None:
        """Compare, once the step is over, and forget the flag."""
        flag, tell, samples, before = self._flag, self._tell, self._samples, self._before
        self.forget()
        if flag is not None and samples is not None and before:
            found = unlike(before, samples.now())
            with Aside():
                tell(LateProof(self._family, found & moved(flag, found.device)))

    def forget(self) -> None:
        """Say that no such step is to come."""
        if self._flag is not None:
            for name in ("found_inf", "grad_scale"):
                vars(self._optimizer).pop(name, None)
            self._flag, self._before, self._tell = None, [], lambda proof: None
            self.is_armed = False


def _held(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that have a gradient, and what the optimizer remembers of them."""
    found: list[Tensor] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                found.append(p)
                state: Any = optimizer.state.get(p)
                if isinstance(state, Mapping):
                    found += [t for t in state.values() if isinstance(t, Tensor)]
    return found
