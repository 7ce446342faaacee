"""Hooks on the gradients of parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._dispatch import finish, sorted_entries
from ._hook import Entry
from ._points import Point
from ._runs import Inert, Runs

__all__ = ["ParameterSite"]


class ParameterSite:
    """The hooks of one manager on one parameter: `grad` at each backward, `accumulated_grad` after accumulation.

    Under DDP both see the gradient of this rank, before it is averaged.
    """

    __torch_unserializable__ = True
    is_copy = False

    def __init__(self, path: str, parameter: nn.Parameter, runs: Runs) -> None:
        self.path, self.parameter, self.runs = path, parameter, runs
        self.entries: list[Entry] = []
        self.handles: dict[str, Any] = {}
        self._counted = (-2, 0)

    def refresh(self) -> None:
        self.by_port = {port: sorted_entries(self.entries, port) for port in ("grad", "accumulated_grad")}
        for port, entries in self.by_port.items():
            if not entries and port in self.handles:
                self.handles.pop(port).remove()
            elif entries and port not in self.handles and self.parameter.requires_grad:
                if port == "grad":
                    self.handles[port] = self.parameter.register_hook(_OnGradient(self))
                else:
                    self.handles[port] = self.parameter.register_post_accumulate_grad_hook(self.on_accumulated)

    def take_off(self) -> None:
        self.entries = []
        self.refresh()

    def _call(self) -> int:
        step, number = self._counted
        number = number + 1 if step == self.runs.last_step else 0
        self._counted = (self.runs.last_step, number)
        return number

    def _run(self, port: str, grad: Tensor) -> Tensor:
        step, call = max(self.runs.last_step, 0), self._call()
        new = grad
        for entry in self.by_port[port]:
            hook = entry.hook
            # Backward on a GPU runs in autograd's own threads: only on the CPU does the thread tell whose pass it is.
            if not hook.is_enabled or not hook.wants(step, False, backward=grad.device.type != "cpu"):
                continue
            point = Point(entry.spot, hook, call, step, False, "")
            if not hook.holds(point):
                continue
            replaced = hook.fire(new, point, True)
            finish(entry, True, False)
            new = new if replaced is None else replaced
        return new

    def on_accumulated(self, parameter: Tensor) -> None:
        if self.is_copy or parameter.grad is None:
            return
        new = self._run("accumulated_grad", parameter.grad)
        if new is not parameter.grad:
            parameter.grad = new

    def __deepcopy__(self, memo: Any) -> Inert:
        return Inert()

    def __reduce__(self) -> Any:
        return (Inert, ())


class _OnGradient:
    """The tensor hook on a parameter. Torch does not pickle these, and is told not to warn of it."""

    __slots__ = ("site",)
    __torch_unserializable__ = True

    def __init__(self, site: ParameterSite) -> None:
        self.site = site

    def __call__(self, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        new = self.site._run("grad", grad)
        return None if new is grad else new
