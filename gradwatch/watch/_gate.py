"""The veto: keeps an optimizer from moving anything at one step, without a trace (O4)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Gates", "StepGate"]


# A compiled `optimizer.step` would compile all of the measuring with it. `torch.compiler.disable` imports the compiler
# at once; this does so when it is called, as the optimizer's own methods do that bear it. It is private: without it the
# hooks are compiled.
_uncompiled: Callable[[Any], Any] = getattr(torch, "_disable_dynamo", lambda f: f)


class _Inert:
    """What a gate's hooks become in a copied or unpickled optimizer: nothing (H14)."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Hook:
    """A step hook that holds its gate weakly and is inert on copies."""

    def __init__(self, gate: StepGate, method: str) -> None:
        self._gate = weakref.ref(gate)
        self._method = method

    @_uncompiled
    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        gate = self._gate()
        return None if gate is None else getattr(gate, self._method)(optimizer, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()


class StepGate:
    """Vetoes single steps of one optimizer, and tells when it has stepped.

    A vetoed step runs with every gradient of the optimizer set to None: parameters and optimizer state stay bit for
    bit as they were, while schedulers, loss scalers and step counters go on in step. Zeroed gradients would not do
    (C2): momentum, Adam and weight decay move all the same.

    Args:
        optimizer: the raw torch optimizer.
        on_stepped: called after each `optimizer.step()` that ran.
    """

    def __init__(self, optimizer: Optimizer, on_stepped: Callable[[Optimizer], None] | None = None) -> None:
        self.optimizer = optimizer
        self._on_stepped = on_stepped
        self._pending: bool | Tensor = False
        self._found_inf: Tensor | None = None
        self._handles = [
            optimizer.register_step_pre_hook(_Hook(self, "_before")),
            optimizer.register_step_post_hook(_Hook(self, "_after")),
        ]

    def arm(self, veto: bool | Tensor) -> None:
        """Set whether the next step is vetoed. Call it at every step, so that no old veto outlives its own (O4)."""
        self._pending = veto
        self._found_inf = None

    def arm_on_device(self, veto: Tensor) -> None:
        """Let a fused optimizer decide for itself, from a flag on the device: it moves nothing where `found_inf` is
        set, as it does under a loss scaler. Nobody waits for the flag.
        """
        self._pending = False
        self._found_inf = veto.to(torch.float32).reshape(())

    @staticmethod
    def can_arm_on_device(optimizer: Optimizer) -> bool:
        """Whether the optimizer reads `found_inf` in its step: torch's fused ones do (C7)."""
        return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and not hasattr(optimizer, "found_inf")

    @property
    def pending(self) -> bool | Tensor:
        return self._pending

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._pending = False

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        # args[0] is the optimizer itself; under a scaler there is no closure.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._settle()
            return None

        def wrapped() -> Any:
            # Lightning's closure runs the whole of forward and backward: the decision falls inside it.
            result = closure()
            self._settle()
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _settle(self) -> None:
        veto, self._pending = self._pending, False
        if isinstance(veto, Tensor):
            veto = bool(veto)  # a host read: the one wait, announced by the engine where it can't be avoided
        if veto:
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None
        if self._found_inf is not None:
            vars(self.optimizer).update(found_inf=self._found_inf, grad_scale=None)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._found_inf is not None:
            self._found_inf = None
            for name in ("found_inf", "grad_scale"):
                vars(optimizer).pop(name, None)
        if self._on_stepped is not None:
            self._on_stepped(optimizer)


class Gates:
    """The gates of all optimizers of a run; one that turns up later gets its own."""

    def __init__(self, optimizers: Iterable[Optimizer], on_stepped: Callable[[Optimizer], None]) -> None:
        self._on_stepped = on_stepped
        self._gates: dict[int, StepGate] = {}
        for optimizer in optimizers:
            self._of(optimizer)

    def _of(self, optimizer: Optimizer) -> StepGate:
        if id(optimizer) not in self._gates:
            self._gates[id(optimizer)] = StepGate(optimizer, self._on_stepped)
        return self._gates[id(optimizer)]

    def arm(self, optimizers: Iterable[Optimizer], veto: bool) -> None:
        """Set whether the next step of these optimizers is vetoed."""
        for optimizer in optimizers:
            self._of(optimizer).arm(veto)

    def arm_on_device(self, optimizers: Iterable[Optimizer], veto: Tensor) -> None:
        """Let fused optimizers decide from a flag on the device."""
        for optimizer in optimizers:
            self._of(optimizer).arm_on_device(veto)

    def close(self) -> None:
        for gate in self._gates.values():
            gate.close()
        self._gates = {}
