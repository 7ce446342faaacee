"""The callables a tap leaves on modules: they hold no tensor, return nothing, and are inert on copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.compiler import is_compiling

if TYPE_CHECKING:
    from ._tap import ModuleTap

__all__ = ["BackwardProbe", "ForwardProbe", "GradProbe", "PreForwardProbe"]


class _Inert:
    """What a probe becomes in a copied or unpickled model: it does nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Probe:
    """A callable that belongs to one tap and one of its rows, for one period of being armed.

    Deep copies of the model (EMA, SWA), pickles and checkpoints get an inert object in its place.
    """

    __slots__ = ("period", "row", "tap")

    def __init__(self, tap: ModuleTap, row: int) -> None:
        self.tap = tap
        self.row = row
        self.period = tap.period

    def __deepcopy__(self, memo: dict[int, Any]) -> _Inert:
        return _Inert()

    def __copy__(self) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return (_Inert, ())

    @property
    def live(self) -> bool:
        """A graph outlives the handle that put the probe there: what it reports later belongs to no step."""
        return self.tap.armed and self.tap.period == self.period


class PreForwardProbe(_Probe):
    """On a module, before its forward."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not is_compiling() and self.live:
            self.tap.on_enter(self.row, args, kwargs)


class ForwardProbe(_Probe):
    """On a module, after its forward. Any return but None would replace the output."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tap = self.tap
        if tap.armed and tap.period == self.period and not is_compiling():
            tap.on_forward(self.row, args, kwargs, output)


class GradProbe(_Probe):
    """On an output tensor: is given the gradient with respect to it."""

    __slots__ = ()

    def __call__(self, grad: Tensor | None) -> None:
        # None: torch's way to say zero, to a hook on an output of a fused function that nothing used.
        tap = self.tap
        if grad is not None and tap.armed and tap.period == self.period:
            tap.on_grad(self.row, grad)


class BackwardProbe(_Probe):
    """torch's full backward hook on a module."""

    __slots__ = ()

    def __call__(self, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        if self.live:
            for grad in grad_output:
                if isinstance(grad, Tensor):
                    self.tap.on_grad(self.row, grad)
