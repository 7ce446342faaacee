"""The usual case, fast: one hook without conditions at a module whose output is one tensor.

What is written out here is what `run_entry` does, in as few Python steps as can be: an observer costs about as much as
one and a half empty torch hooks. Anything unusual goes the general way, `Site.after`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from sys import getrefcount
from threading import get_ident
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..torchside import MethodHook, may_be_checkpointed, untraced
from ._gradients import hook_gradient
from ._hook import Entry, set_grad_enabled
from ._points import Point
from ._replay import tie
from ._runs import graph_task_id

if TYPE_CHECKING:
    from ._dispatch import Site

__all__ = ["FastGradient", "FastLook", "FastOutput"]

is_grad_enabled = torch.is_grad_enabled
IN_PLACE = "an observer changed the tensor in place: use an Intervention, or work on a copy"


def _unkept_references() -> int:
    """Return how many references a point has that a quick dispatcher alone holds, seen from its own call: a matter of
    the Python version, measured in the same way as it is asked."""

    class Holder:
        point = object()

    holder = Holder()
    holder.point = object()
    point = holder.point
    return getrefcount(point)


# Found at import: with any more someone keeps the point.
UNKEPT = _unkept_references()


class _RunPoint(Point):
    """A point that knows its forward pass, and so needs no number written into it at each call."""

    __slots__ = ("run",)

    def __init__(self, entry: Entry, call: int, run: Any) -> None:
        self.spot = entry.spot
        self.hook = entry.hook
        self.call = call
        self.is_recompute = False
        self.leaf = ""
        self.run = run

    @property
    def step(self) -> int:  # type: ignore[override]
        step: int = self.run.step
        return step


class _Inert:
    """What stands for a quick dispatcher on a copy: a call of any kind ends at once."""

    tensor_type = None
    bound = -1  # no thread has this number
    runs = SimpleNamespace(run=None)

    @untraced
    def __call__(self, *_: Any) -> None:
        return None

    slow = _go_slow = __call__

    def __reduce__(self) -> Any:
        return _Fast.__reduce__(self)  # type: ignore[arg-type]


_INERT = _Inert()


class _Fast(MethodHook):
    """One entry with all it needs at hand: what a call touches is it, the point and the run. Torch calls it."""

    __slots__ = ("bound", "call", "entry", "fired", "fn", "hook", "point", "run", "runs", "site", "tensor_type")

    def __init__(self, site: Site, entry: Entry) -> None:
        self.site, self.entry, self.runs = site, entry, site.runs
        self.hook = entry.hook
        self.bound = entry.hook.thread
        self.fn: Callable[[Tensor, Point], Any] = entry.hook.function
        self.tensor_type: Any = Tensor
        self.run: Any = None
        self.call = self.fired = 0
        self.point = _RunPoint(entry, 0, None)
        entry.counted_by(self)

    def hang(self, register: Callable[..., Any], **options: Any) -> Any:
        # It keeps its site, which so can't go before it.
        self.tensor_type = Tensor
        handle = self._handle = register(self._called(), **options)
        return handle

    def take_off(self) -> None:
        # In a walk of torch's that is under way, also in another thread, it may be called once more: it goes slow.
        self.tensor_type = None
        self._handle.remove()

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        self._place = weakref.ref(self.site.module)
        return super().__deepcopy__(memo)

    def inert(self) -> Any:
        return _INERT

    def slow(self, module: nn.Module, args: tuple[Any, ...], output: Any, call: int) -> Any:
        """Go the general way, with the number of this call."""
        site = self.site
        if site.quick is not self:  # taken off in the midst of the walk that calls it
            return None
        if graph_task_id() == -1:
            self.runs.local.calls[site.key] = call
        return site.after(module, args, {}, output)


class FastOutput(_Fast):
    """At `output`."""

    __slots__ = ()

    def _go_slow(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        run, point = self.runs.run, self.point
        if graph_task_id() != -1:
            return self.slow(module, args, output, 0)
        call = point.call + 1 if point.run is run else 0
        self.point = _RunPoint(self.entry, call, run)
        return self.slow(module, args, output, call)

    @untraced
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        run = self.runs.run
        if type(output) is not self.tensor_type or graph_task_id() != -1 or may_be_checkpointed(run.recording):
            return self._go_slow(module, args, output)
        if self.bound is not None and self.bound != get_ident():
            return None
        point = self.point
        if getrefcount(point) > UNKEPT:  # someone keeps it: make another
            self.point = point = _RunPoint(self.entry, point.call + 1 if point.run is run else 0, run)
        elif point.run is run:
            point.call += 1
        else:
            point.run = run
            point.call = 0
        self.fired += 1
        try:
            new = self.fn(output, point)
        except Exception as cause:
            self.hook.fail_or_break(cause, point)
            return None
        return None if new is None else self.hook.checked(new, output, point)


class FastLook(FastOutput):
    """At `output`, for what only looks."""

    __slots__ = ()

    @untraced
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if type(output) is not self.tensor_type or graph_task_id() != -1:
            return self._go_slow(module, args, output)
        if self.bound is not None and self.bound != get_ident():
            return None
        try:
            version = output._version
        except RuntimeError:  # an inference tensor, which has none
            return self._go_slow(module, args, output)
        run = self.runs.run
        point = self.point
        if getrefcount(point) > UNKEPT:
            self.point = point = _RunPoint(self.entry, point.call + 1 if point.run is run else 0, run)
        elif point.run is run:
            point.call += 1
        else:
            point.run = run
            point.call = 0
        self.fired += 1
        recording = is_grad_enabled()
        try:
            if recording:
                set_grad_enabled(False)
            self.fn(output, point)
        except Exception as cause:
            self.hook.fail_or_break(cause, point)
        finally:
            if recording:
                set_grad_enabled(True)
        if output._version != version:
            self.hook.fail(RuntimeError(IN_PLACE), point)
        return None


class FastGradient(_Fast):
    """At `grad_output`: a hook on the output tensor, placed from a forward hook."""

    __slots__ = ()

    @untraced
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        run = self.runs.run
        if graph_task_id() != -1:
            self.slow(module, args, output, 0)
            return
        if self.bound is not None and self.bound != get_ident():
            return
        if run is self.run:
            self.call += 1
        else:
            self.run = run
            self.call = 0
        if type(output) is not self.tensor_type or (output.requires_grad and output.is_leaf):
            self.slow(module, args, output, self.call)
            return
        entry = self.entry
        entry.seen += 1
        if output.requires_grad and is_grad_enabled():
            entry.placed += 1
            call = OneGradient(entry, self.call, run.step)
            if not output._is_view():
                output.register_hook(call)
            elif type(module) is nn.Linear:
                # The view of a matrix product that nothing else can have used: a hook on the product sees the gradient
                # also when the view is changed in place later (see `hook_gradient`), and is as cheap as on the view.
                output._base.register_hook(_OfBase(call, output.shape))
            else:
                hook_gradient(output, call, args, module, on_lost=call.lost)
        elif run.recording and not is_grad_enabled():
            entry.shaded += tie(entry, self.runs, self.call)


class OneGradient:
    """The hook on one tensor's gradient; it knows the call, never the tensor."""

    __slots__ = ("bound", "call", "entry", "step")
    __torch_unserializable__ = True

    def __init__(self, entry: Entry, call: int, step: int) -> None:
        self.entry, self.call, self.step = entry, call, step

    @untraced
    def __call__(self, grad: Tensor | None) -> Tensor | None:
        entry = self.entry
        hook = entry.hook
        if grad is None or not (hook.alive and hook._enabled):
            return None
        entry.count()
        return hook.fire(grad, Point(entry.spot, hook, self.call, self.step, False, ""), True)

    def lost(self) -> None:
        self.entry.hook.miss(self.entry, Point(self.entry.spot, self.entry.hook, self.call, self.step, False, ""))


class _OfBase:
    """Shows the gradient of a view's base as that of the view."""

    __slots__ = ("bound", "call", "shape")
    __torch_unserializable__ = True

    def __init__(self, call: OneGradient, shape: torch.Size) -> None:
        self.call, self.shape = call, shape

    @untraced
    def __call__(self, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        new = self.call(grad.reshape(self.shape))
        return None if new is None else new.reshape(grad.shape)
