"""Hooks on the gradients of parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..torchside import WeakHook, is_host
from ._dispatch import finish, sorted_entries
from ._hook import Entry
from ._points import Point
from ._runs import Runs

if TYPE_CHECKING:
    from ._registry import Registry

__all__ = ["ParameterSite"]


class ParameterSite:
    """The hooks of one manager on one parameter: `grad` at each backward, `accumulated_grad` after accumulation.

    Under DDP both see the gradient of this rank, before it is averaged.
    """

    def __init__(self, path: str, parameter: nn.Parameter, runs: Runs, registry: Registry) -> None:
        self.path, self.parameter, self.runs, self.registry = path, parameter, runs, registry
        self.entries: list[Entry] = []
        self.replayed: tuple[Entry, ...] = ()
        self.handles: dict[str, Any] = {}
        self._counted: dict[str, tuple[int, int]] = {}
        self.by_port: dict[str, tuple[Entry, ...]] = {}

    def refresh(self) -> None:
        self.by_port = {port: sorted_entries(self.entries, port) for port in ("grad", "accumulated_grad")}
        for port, entries in self.by_port.items():
            if not entries and port in self.handles:
                self.handles[port].remove()
                del self.handles[port]
            elif entries and port not in self.handles and self.parameter.requires_grad:
                if port == "grad":
                    self.handles[port] = WeakHook.of(self.on_gradient, keeps_owner=True).hang(
                        self.parameter.register_hook
                    )
                else:
                    register = self.parameter.register_post_accumulate_grad_hook
                    self.handles[port] = WeakHook.of(self.on_accumulated, keeps_owner=True).hang(register)

    @property
    def waits(self) -> bool:
        """Whether a hook can't hang yet: the parameter does not require a gradient."""
        return any(entries and port not in self.handles for port, entries in self.by_port.items())

    def take_off(self) -> None:
        self.entries = []
        self.refresh()

    def _call(self, port: str) -> int:
        step, number = self._counted.get(port, (-2, 0))
        number = number + 1 if step == self.runs.last_step else 0
        self._counted[port] = (self.runs.last_step, number)
        return number

    def _run(self, port: str, grad: Tensor) -> Tensor:
        step, call = max(self.runs.last_step, 0), self._call(port)
        new = grad
        for entry in self.by_port[port]:
            hook = entry.hook
            # Backward on a GPU runs in autograd's own threads: only on the CPU does the thread tell whose pass it is.
            if not hook.is_enabled or not hook.wants(step, False, backward=not is_host(grad.device)):
                continue
            point = Point(entry.spot, hook, call, step, False, "")
            if not hook.holds(point):
                continue
            replaced = hook.fire(new, point, True)
            finish(entry, True, False)
            new = new if replaced is None else replaced
        return new

    def on_accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        new = self._run("accumulated_grad", parameter.grad)
        if new is not parameter.grad:
            parameter.grad = new

    def on_gradient(self, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        new = self._run("grad", grad)
        return None if new is grad else new
