"""The callables a tap leaves on modules: they hold no tensor, return nothing, and are inert on copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..torchside import OwnedHook, is_traced, uncompiled, untraced

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


class _ModuleProbe(_Probe):
    """A probe on a module, which is taken off and hung again many times in a run.

    Attributes:
        hooks: the module's attribute in which torch keeps it.
    """

    __slots__ = ()
    hooks: ClassVar[str]

    @property
    def handle(self) -> Any:
        """By which it comes off."""
        return self._handle

    def hang_again(self) -> bool:
        """Hang it where it hung, behind the hooks that are there now; return whether that could be done.

        Torch's own way makes a new handle each time, and takes ten times as long.
        """
        module, handle = None if self._place is None else self._place(), self._handle
        hooks = None if module is None else vars(module).get(self.hooks)
        with_kwargs = handle.extra_dict_ref[0]() if handle is not None and handle.extra_dict_ref else None
        if hooks is None or with_kwargs is None or handle.hooks_dict_ref() is not hooks:
            return False
        with_kwargs[handle.id] = True  # first: another thread may be calling the module
        hooks[handle.id] = self
        return True

    def hangs_as_torch_does(self) -> bool:
        """Whether it hangs as torch's own modules register it, and so can be hung again."""
        hooks = self._handle.hooks_dict_ref()
        extra = [reference() for reference in self._handle.extra_dict_ref]
        is_kept = hooks is not None and hooks.get(self._handle.id) is self
        return is_kept and bool(extra) and extra[0] is not None and extra[0].get(self._handle.id) is True


class PreForwardProbe(_ModuleProbe):
    """On a module, before its forward."""

    __slots__ = ()
    hooks = "_forward_pre_hooks"

    @uncompiled
    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        # Without keyword arguments: taken off in the midst of torch's walk.
        if kwargs is not None and not is_traced() and (tap := self.tap) is not None:
            tap.on_enter(self.row, args, kwargs)


class ForwardProbe(_ModuleProbe):
    """On a module, after its forward. Any return but None would replace the output."""

    __slots__ = ()
    hooks = "_forward_hooks"

    @uncompiled
    def __call__(self, module: nn.Module, args: Any, *kwargs_and_output: Any) -> None:
        # The output alone: taken off in the midst of torch's walk.
        if len(kwargs_and_output) == 2 and not is_traced() and (tap := self.tap) is not None:
            tap.on_forward(self.row, args, *kwargs_and_output)


class GradProbe(_Probe):
    """On an output tensor: is given the gradient with respect to it."""

    __slots__ = ()

    @untraced
    def __call__(self, grad: Tensor | None) -> None:
        # None: torch's way to say zero, to a hook on an output of a fused function that nothing used.
        if grad is None:
            return
        tap = self._owner()
        if tap is None:
            self.take_off()
        elif tap.armed and tap.period == self.period:
            tap.on_grad(self.row, grad)


class BackwardProbe(_Probe):
    """torch's full backward hook on a module."""

    __slots__ = ()

    @untraced
    def __call__(self, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        if (tap := self.tap) is not None:
            for grad in grad_output:
                if isinstance(grad, Tensor):
                    tap.on_grad(self.row, grad)
