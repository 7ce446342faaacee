"""The callables a tap leaves on modules: they hold no tensor, return nothing, and are inert on copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..torchside import OwnedHook, is_traced

if TYPE_CHECKING:
    from ._tap import ModuleTap

__all__ = ["BYSTANDER", "BackwardProbe", "ForwardProbe", "GradProbe", "PreForwardProbe"]


BYSTANDER = -1
"""The row of modules that are not watched, whose calls enclose those of others."""


class _Probe(OwnedHook):
    """A callable that belongs to one tap and one of its rows, for one period of being armed."""

    __slots__ = ("period", "row")

    def __init__(self, tap: ModuleTap, row: int) -> None:
        super().__init__(tap)
        self.row = row
        self.period = tap.period

    @property
    def tap(self) -> ModuleTap | None:
        """The tap, while it is there and listens.

        A graph outlives the handle that put the probe there: what it reports later belongs to no step.
        """
        tap: ModuleTap | None = self._owner()
        if tap is None:
            self.take_off()
            return None
        return tap if tap.armed and tap.period == self.period else None


class PreForwardProbe(_Probe):
    """On a module, before its forward."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not is_traced() and (tap := self.tap) is not None:
            tap.on_enter(self.row, args, kwargs)


class ForwardProbe(_Probe):
    """On a module, after its forward. Any return but None would replace the output."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not is_traced() and (tap := self.tap) is not None:
            tap.on_forward(self.row, args, kwargs, output)


class GradProbe(_Probe):
    """On an output tensor: is given the gradient with respect to it."""

    __slots__ = ()

    def __call__(self, grad: Tensor | None) -> None:
        # None: torch's way to say zero, to a hook on an output of a fused function that nothing used.
        if grad is not None and (tap := self.tap) is not None:
            tap.on_grad(self.row, grad)


class BackwardProbe(_Probe):
    """torch's full backward hook on a module."""

    __slots__ = ()

    def __call__(self, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        if (tap := self.tap) is not None:
            for grad in grad_output:
                if isinstance(grad, Tensor):
                    tap.on_grad(self.row, grad)
