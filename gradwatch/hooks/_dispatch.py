"""What torch calls: one object per module, with at most one torch hook per direction, inert on copies.

The methods of a `Site` are the torch hooks. Deep-copying or pickling a bound method copies the object it is bound to,
so that a copied model holds `Inert` ones: silent, and free of locks, writers and managers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ._fast import FastGradient, FastOutput
from ._gradients import hook_gradient
from ._hook import Entry
from ._points import Point, RawCall
from ._pytree import map_tensors, tensors_of
from ._runs import Inert, Runs, graph_task_id, untraced

__all__ = ["GradientCall", "Site"]

FORWARD_PORTS = ("input", "grad_at_input", "output", "grad_output", "grad_input")


def sorted_entries(entries: list[Entry], port: str) -> tuple[Entry, ...]:
    """Return the enabled ones at a port, in the order they run."""
    active = [e for e in entries if e.spot.port == port and e.hook.is_enabled and not e.done]
    return tuple(sorted(active, key=lambda e: (-e.hook.options.priority, e.hook.order)))


def run_entry(entry: Entry, tree: Any, call: int, step: int, recompute: bool, *, guarded: bool = False) -> Any:
    """Visit the tensors of a tree with one hook; return the tree, or a new one where something was replaced."""
    hook, wanted, num_seen, ran = entry.hook, entry.leaf, 0, False

    def visit(tensor: Tensor, leaf: str) -> Tensor | None:
        nonlocal num_seen, ran
        num_seen += 1
        if wanted is not None and leaf != wanted and not (wanted == "first" and num_seen == 1):
            return None
        point = Point(entry.spot, hook, call, step, recompute, leaf)
        if not hook.holds(point):
            return None
        ran = True
        return hook.fire(tensor, point, guarded)

    new = map_tensors(tree, visit)
    finish(entry, ran, recompute)
    if num_seen == 0:
        entry.note = f"it holds no tensor: {type(tree).__name__}"
    return new


def run_raw(entry: Entry, raw: RawCall, call: int, step: int, recompute: bool) -> Any:
    """Hand torch's own arguments to one hook; return what it returns."""
    hook = entry.hook
    point = Point(entry.spot, hook, call, step, recompute, "")
    if not hook.holds(point):
        return None
    try:
        with torch.no_grad() if hook.observes else nullcontext():
            result = hook.fn(raw, point)
        finish(entry, True, recompute)
        return None if hook.observes else result
    except Exception as cause:
        hook.fail_or_break(cause, point)
        return None


def finish(entry: Entry, ran: bool, recompute: bool) -> None:
    """Count a firing; retire a hook that was wanted once."""
    if not ran or recompute:
        return
    entry.count()
    if entry.hook.options.once:
        entry.done = True
        hook = entry.hook
        if all(other.done for other in hook.entries):
            hook.remove()
        else:
            hook.manager._refresh(hook)


class GradientCall:
    """A hook on one tensor's gradient. Knows the call, never the tensor: that would keep every graph alive."""

    __slots__ = ("call", "entries", "leaf", "step")
    __torch_unserializable__ = True

    def __init__(self, entries: tuple[Entry, ...], call: int, step: int, leaf: str) -> None:
        self.entries, self.call, self.step, self.leaf = entries, call, step, leaf

    @untraced
    def __call__(self, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        new = grad
        for entry in self.entries:
            hook = entry.hook
            # Graphs outlive hooks: the handle is gone, this object is not.
            if not (hook.alive and hook._enabled) or entry.done:
                continue
            point = Point(entry.spot, hook, self.call, self.step, False, self.leaf)
            if not hook.holds(point):
                continue
            replaced = hook.fire(new, point, True)
            new = new if replaced is None else replaced
            finish(entry, True, False)
        return None if new is grad else new


class Site:
    """The hooks of one manager on one module."""

    is_copy = False

    def __init__(self, path: str, module: nn.Module, runs: Runs) -> None:
        self.path, self.module, self.runs = path, module, runs
        self.entries: list[Entry] = []
        self.key = runs.new_key()
        self.handles: dict[str, tuple[Any, Any]] = {}
        self.leaf_handles: dict[tuple[str, str], Any] = {}
        self.is_root = path == ""
        self.begins = False
        self.quick: FastOutput | FastGradient | None = None
        self._full_before: Any = None

    def refresh(self) -> None:
        """Make torch's hooks fit the entries that are enabled now."""
        by_port = {port: sorted_entries(self.entries, port) for port in FORWARD_PORTS}
        self.inputs, self.input_gradients = by_port["input"], by_port["grad_at_input"]
        self.outputs, self.gradients, self.full_hooks = by_port["output"], by_port["grad_output"], by_port["grad_input"]
        after: Callable[..., Any] | None = None
        if self.outputs or self.gradients or self.full_hooks:
            after = self.after_root if self.begins else self._fast() or self.after
        self._fit("before", self.before if self.inputs or self.input_gradients else None)
        self._fit("after", after)
        self._fit("full", self.full if self.full_hooks else None)

    def _fast(self) -> Callable[..., Any] | None:
        """Return the quick way for the usual case, one hook without conditions, where this is one."""
        entries = self.outputs + self.gradients + self.full_hooks
        if len(entries) != 1 or not entries[0].hook.plain or self.runs.threaded:
            return None
        entry = entries[0]
        if entry.leaf is not None or entry.spot.view is not None or entry.spot.writing != "replace":
            return None
        if entry.spot.port not in ("output", "grad_output"):
            return None
        if self.quick is None or self.quick.entry is not entry:
            self.quick = FastOutput(self, entry) if entry.spot.port == "output" else FastGradient(self, entry)
        return self.quick.quick

    def _fit(self, kind: str, wanted: Callable[..., Any] | None) -> None:
        old, handle = self.handles.get(kind, (None, None))
        if old == wanted:
            return
        if handle is not None:
            del self.handles[kind]
            handle.remove()
            if kind == "full" and not self.module._backward_hooks:
                # torch never takes this mark back, and refuses the other kind of backward hook for ever (H8).
                self.module._is_full_backward_hook = self._full_before
        if wanted is None:
            return
        if kind == "before":
            handle = self.module.register_forward_pre_hook(wanted, with_kwargs=True)
        elif kind == "after":
            handle = self.module.register_forward_hook(wanted, with_kwargs=wanted in (self.after, self.after_root))
        else:
            self._full_before = self.module._is_full_backward_hook
            handle = self.module.register_full_backward_hook(wanted)
        self.handles[kind] = (wanted, handle)

    def take_off(self) -> None:
        self.entries, self.quick = [], None
        self.refresh()
        for handle in self.leaf_handles.values():
            handle.remove()
        self.leaf_handles.clear()

    @untraced
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.is_copy:
            return None
        recompute = graph_task_id() != -1
        call = self.runs.count(~self.key, recompute)
        step = self.runs.local.step
        bare = not kwargs and len(args) == 1
        old = args[0] if bare else {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}
        new = old
        for entry in self.inputs:
            if not entry.hook.wants(step, recompute):
                continue
            entry.seen += 1
            if not entry.hook.options.raw:
                new = run_entry(entry, new, call, step, recompute)
                continue
            result = run_raw(entry, RawCall(*_unpacked(new, args, kwargs, bare)), call, step, recompute)
            if result is not None:
                raw_args, raw_kwargs = result
                return self._placed_input(tuple(raw_args), dict(raw_kwargs), call, step)
        if new is old:
            if self.input_gradients:
                self._place(self.input_gradients, old, call, step)
            return None
        return self._placed_input(*_unpacked(new, args, kwargs, bare), call, step)

    def _placed_input(self, args: Any, kwargs: Any, call: int, step: int) -> Any:
        if self.input_gradients:
            self._place(self.input_gradients, [*args, *kwargs.values()], call, step)
        return args, kwargs

    @untraced
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.is_copy:
            return None
        recompute = graph_task_id() != -1
        call = self.runs.count(self.key, recompute)
        step = self.runs.local.step
        new = output
        for entry in self.outputs:
            if not entry.hook.wants(step, recompute):
                continue
            entry.seen += 1
            if entry.hook.options.raw:
                result = run_raw(entry, RawCall(args, kwargs, new), call, step, recompute)
                new = new if result is None else result
            else:
                new = run_entry(entry, new, call, step, recompute)
        if self.gradients:
            self._place(self.gradients, new, call, step, args)
        for entry in self.full_hooks:
            entry.seen += not recompute
        return None if new is output else new

    @untraced
    def after_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Where only the root's output is hooked, the pass may as well begin here: one torch hook instead of two."""
        if self.is_copy:
            return None
        self.runs.begin()
        return self.after(module, args, kwargs, output)

    def _place(self, entries: tuple[Entry, ...], tree: Any, call: int, step: int, inputs: tuple[Any, ...] = ()) -> None:
        """Put a hook on the gradient of each tensor of an output (or input)."""
        recompute = graph_task_id() != -1
        wanted = tuple(e for e in entries if e.hook.wants(step, False))
        for entry in wanted:
            entry.seen += not recompute
        if not wanted or not torch.is_grad_enabled():
            return
        found = [(leaf, tensor) for leaf, tensor in tensors_of(tree) if tensor.requires_grad]
        for number, (leaf, tensor) in enumerate(found):
            here = tuple(e for e in wanted if e.leaf in (None, leaf) or (e.leaf == "first" and number == 0))
            if not here:
                continue
            for entry in here:
                entry.placed += 1
            # Only a bare output is sure to be all that came of its base.
            given = GradientCall(here, call, step, leaf)
            handle = (
                hook_gradient(tensor, given, inputs, self.module) if tree is tensor else tensor.register_hook(given)
            )
            if tensor.is_leaf:  # outlives the graph: at most one stays
                previous = self.leaf_handles.pop((leaf, here[0].spot.port), None)
                if previous is not None:
                    previous.remove()
                self.leaf_handles[leaf, here[0].spot.port] = handle

    @untraced
    def full(self, module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        """Torch's full backward hook. Calls of one forward pass come back last first."""
        if self.is_copy:
            return None
        num_calls = self.runs.local.calls.get(self.key, 0)
        call = max(num_calls - 1 - self.runs.count(-(10**9) - self.key, False), 0)
        step = self.runs.local.step
        new = grad_input
        for entry in self.full_hooks:
            if not entry.hook.wants(step, False, backward=True):
                continue
            entry.placed += 1
            if entry.hook.options.raw:
                result = run_raw(entry, RawCall(new, {}, grad_output), call, step, False)
                new = new if result is None else result
            else:
                new = run_entry(entry, new, call, step, False, guarded=True)
        return None if new is grad_input else new

    def __deepcopy__(self, memo: Any) -> Inert:
        return Inert()

    def __reduce__(self) -> Any:
        return (Inert, ())


def _unpacked(tree: Any, args: tuple[Any, ...], kwargs: dict[str, Any], bare: bool) -> tuple[Any, Any]:
    if bare:
        return (tree,), {}
    return tuple(tree[str(i)] for i in range(len(args))), {key: tree[key] for key in kwargs}
