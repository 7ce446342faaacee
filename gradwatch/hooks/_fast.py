"""The usual case, fast: one hook without conditions at a module whose output is one tensor.

What is written out here is what `run_entry` does, in as few Python steps as can be: an observer costs about as much as
one and a half empty torch hooks. Anything unusual goes the general way, `Site.after`.
"""

from __future__ import annotations

from collections.abc import Callable
from sys import getrefcount
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._gradients import hook_gradient
from ._hook import Entry, set_grad_enabled
from ._points import Point
from ._runs import Inert, graph_task_id, untraced

if TYPE_CHECKING:
    from ._dispatch import Site

__all__ = ["FastGradient", "FastOutput"]

is_grad_enabled = torch.is_grad_enabled
IN_PLACE = "an observer changed the tensor in place: use an Intervention, or work on a copy"


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


class _Fast:
    """One entry with all it needs at hand: what a call touches is this, the point and the run. Inert when copied."""

    __slots__ = ("call", "entry", "fired", "fn", "hook", "point", "run", "runs", "site", "tensor_type")

    def __init__(self, site: Site, entry: Entry) -> None:
        self.site, self.entry, self.runs = site, entry, site.runs
        self.hook = entry.hook
        self.fn: Callable[[Tensor, Point], Any] = entry.hook.function
        self.tensor_type: Any = Tensor
        self.run: Any = None
        self.call = self.fired = 0
        self.point = _RunPoint(entry, 0, None)
        entry.counted_by(self)

    def __deepcopy__(self, memo: Any) -> Inert:
        return Inert()

    def __reduce__(self) -> Any:
        return (Inert, ())


class FastOutput(_Fast):
    """At `output`."""

    __slots__ = ()

    @property
    def quick(self) -> Callable[..., Any]:
        return self.on_output_look if self.hook.observes else self.on_output

    @untraced
    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if type(output) is not self.tensor_type or graph_task_id() != -1:
            return self.site.after(module, args, {}, output)
        run = self.runs.run
        point = self.point
        # Three references: ours, this variable, the argument. With any more someone keeps the point: make another.
        if getrefcount(point) != 3:
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

    @untraced
    def on_output_look(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if type(output) is not self.tensor_type or graph_task_id() != -1:
            return self.site.after(module, args, {}, output)
        try:
            version = output._version
        except RuntimeError:  # an inference tensor, which has none
            return self.site.after(module, args, {}, output)
        run = self.runs.run
        point = self.point
        if getrefcount(point) != 3:
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
    """At `grad_output`: a hook on the output tensor, placed from a forward hook (H2, B1)."""

    __slots__ = ()

    @property
    def quick(self) -> Callable[..., Any]:
        return self.on_placing

    @untraced
    def on_placing(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if type(output) is not self.tensor_type or graph_task_id() != -1 or (output.requires_grad and output.is_leaf):
            self.site.after(module, args, {}, output)
            return
        run = self.runs.run
        if run is self.run:
            self.call += 1
        else:
            self.run = run
            self.call = 0
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
                hook_gradient(output, call, args, module)


class OneGradient:
    """The hook on one tensor's gradient; it knows the call, never the tensor."""

    __slots__ = ("call", "entry", "step")
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


class _OfBase:
    """Shows the gradient of a view's base as that of the view."""

    __slots__ = ("call", "shape")
    __torch_unserializable__ = True

    def __init__(self, call: OneGradient, shape: torch.Size) -> None:
        self.call, self.shape = call, shape

    @untraced
    def __call__(self, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        new = self.call(grad.reshape(self.shape))
        return None if new is None else new.reshape(grad.shape)
