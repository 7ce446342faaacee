"""What torch calls: one object per module, with at most one torch hook per direction, inert on copies.

The methods of a `Site` are what torch's hooks call. A model does not keep its sites: they live as long as their
manager, and leave with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..torchside import OwnedHook, WeakHook, in_recomputation, map_tensors, may_be_checkpointed, tensors_of, untraced
from ._fast import FastGradient, FastLook, FastOutput
from ._gradients import hook_gradient, hook_view
from ._hook import Entry
from ._points import Point, RawCall
from ._replay import tie
from ._runs import Runs, graph_task_id

if TYPE_CHECKING:
    from ._registry import Registry

__all__ = ["GradientCall", "Site"]

MOST_CALLS = 1024
"""Calls remembered whose backward has not come."""
_NO_CALLS: deque[tuple[int, int]] = deque(maxlen=0)

FORWARD_PORTS = ("input", "grad_at_input", "output", "grad_output", "grad_input")


def in_order(entry: Entry) -> tuple[float, int]:
    return (-entry.hook.options.priority, entry.hook.order)


def active_entries(entries: Sequence[Entry], replayed: Sequence[Entry] = ()) -> list[Entry]:
    """Return those that are enabled, and those that checkpointing repeats."""
    active = [e for e in entries if e.hook.is_enabled and not e.done]
    return active + [e for e in dict.fromkeys(replayed) if e not in active]


def sorted_entries(entries: Sequence[Entry], port: str, replayed: Sequence[Entry] = ()) -> tuple[Entry, ...]:
    """Return the active ones at a port, in the order they run."""
    return tuple(sorted((e for e in active_entries(entries, replayed) if e.spot.port == port), key=in_order))


def takes_part(site: Any, entry: Entry, step: int, recompute: bool) -> bool:
    """Return whether a hook takes part in this call: in a repeated forward, where it did the first time."""
    if not recompute:
        return entry.hook.wants(step, False) and (not site.replayed or entry in site.entries)
    if entry.hook.skips_recompute:
        return False
    replay = site.runs.local.replay
    if replay is not None and replay.has(entry):
        return True
    return entry.hook.wants(step, True) and (entry.hook.observes or not in_recomputation())


def follows(site: Any, entry: Entry, step: int, recompute: bool) -> bool:
    """Return whether a hook on gradients takes part in this call.

    In a repeated forward that is where gradients were off the first time; else it sits in the graph already.
    """
    if not recompute:
        return entry.hook.wants(step, False) and (not site.replayed or entry in site.entries)
    replay = site.runs.local.replay
    if replay is not None and replay.has(entry):
        return True
    return entry in site.entries and entry.hook.wants(step, False) and not in_recomputation()


def has_acted(site: Any, entry: Entry, call: int) -> None:
    """What has acted acts again wherever checkpointing repeats this call."""
    if not entry.hook.skips_recompute and may_be_checkpointed(site.runs.run.recording):
        tie(entry, site.runs, call)


def shade(site: Any, entry: Entry, call: int) -> None:
    """Where gradients are off inside a run that has them on, a hook on one is placed when the call is repeated."""
    if site.runs.run.recording and not torch.is_grad_enabled():
        entry.shaded += tie(entry, site.runs, call)


def _before_others(entries: Sequence[Entry]) -> list[Entry]:
    """Return those that run before torch hooks of others: the prepended ones, and what has to run before these."""
    found: list[Entry] = []
    for port in FORWARD_PORTS if [e for e in entries if e.hook.options.prepend] else ():
        here = sorted((e for e in entries if e.spot.port == port), key=in_order)
        last = max((i for i, e in enumerate(here) if e.hook.options.prepend), default=-1)
        found += here[: last + 1]
    return found


def is_leaf(wanted: str | None, leaf: str, number: int) -> bool:
    """Return whether a leaf is the one that is wanted: None for all, "first", or its name, or one of two."""
    if wanted is None or leaf == wanted:
        return True
    return number == 0 if wanted == "first" else "|" in wanted and leaf in wanted.split("|")


def run_entry(entry: Entry, tree: Any, call: int, step: int, recompute: bool, *, guarded: bool = False) -> Any:
    """Visit the tensors of a tree with one hook; return the tree, or a new one where something was replaced."""
    hook, wanted, num_seen, ran = entry.hook, entry.leaf, 0, False

    def visit(tensor: Tensor, leaf: str) -> Tensor | None:
        nonlocal num_seen, ran
        num_seen += 1
        if not is_leaf(wanted, leaf, num_seen - 1):
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
    elif wanted is not None and not ran:
        known = [leaf for leaf, _ in tensors_of(tree)]
        if not any(is_leaf(wanted, leaf, number) for number, leaf in enumerate(known)):
            entry.note = f"there is no leaf {hook.options.leaf or wanted!r}, only {', '.join(map(repr, known))}"
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
            hook._refit()


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

    def lost(self) -> None:
        for entry in self.entries:
            entry.hook.miss(entry, Point(entry.spot, entry.hook, self.call, self.step, False, self.leaf))


class _Arrival:
    """Notes the call whose backward comes through a module: of torch's full hook, which knows of no call."""

    __slots__ = ("call", "site", "step")
    __torch_unserializable__ = True

    def __init__(self, site: Site, call: int, step: int) -> None:
        self.site, self.call, self.step = site, call, step

    @untraced
    def __call__(self, grad: Tensor | None) -> None:
        self.site.arrived.append((self.call, self.step))


class Site:
    """The hooks of one manager on one module.

    Attributes:
        entries: what was added here.
        replayed: what acts besides while checkpointing repeats a forward in which it acted.
        front: the part that runs before torch hooks of others, where there is one.
    """

    def __init__(self, path: str, module: nn.Module, runs: Runs, registry: Registry, *, first: bool = False) -> None:
        self.path, self.module, self.runs, self.registry, self.first = path, module, runs, registry, first
        self.entries: list[Entry] = []
        self.replayed: list[Entry] = []
        self.front: Site | None = None
        # Calls that backward has come to and whose input's gradient is not there yet: of one that calls itself several;
        # and those whose input has none, where torch's full hook comes first. The last to begin is the first to end.
        self.arrived: deque[tuple[int, int]] = _NO_CALLS
        self.without_input: deque[tuple[int, int]] = _NO_CALLS
        self.inputs: tuple[Entry, ...] = ()
        self.outputs: tuple[Entry, ...] = ()
        self.gradients: tuple[Entry, ...] = ()
        self.input_gradients: tuple[Entry, ...] = ()
        self.full_hooks: tuple[Entry, ...] = ()
        self.key = runs.new_key()
        self.handles: dict[str, tuple[Any, Any]] = {}
        self.leaf_handles: dict[tuple[str, str], Any] = {}
        self.quick: FastOutput | FastGradient | None = None
        # Nothing but the quick way has hung here: nothing of this site is left in a graph when it is taken off.
        self.can_rest = True
        self._full_before: Any = None

    def refresh(self) -> None:
        """Make torch's hooks fit the entries that are enabled now."""
        entries = self.entries
        if len(entries) == 1 and not self.handles and self.front is None and self._hang_one(entries[0]):
            return
        active = active_entries(self.entries, self.replayed)
        early = _before_others(active)
        if early and self.front is None:
            self.front = Site(self.path, self.module, self.runs, self.registry, first=True)
        if self.front is not None:
            self.front.entries, self.front.replayed = self.entries, self.replayed
            self.front._attend(early)
            active = [e for e in active if e not in early]
        self._attend(active)

    def to_front(self) -> None:
        """Hang the part that runs first anew, before what others have hung before it since."""
        if self.front is not None:
            self.front._attend([])
        self.refresh()

    def _attend(self, active: list[Entry]) -> None:
        """Let torch call us for these entries, and no others."""
        by_port: dict[str, tuple[Entry, ...]] = dict.fromkeys(FORWARD_PORTS, ())
        for entry in active if len(active) < 2 else sorted(active, key=in_order):
            by_port[entry.spot.port] += (entry,)
        self.inputs, self.input_gradients = by_port["input"], by_port["grad_at_input"]
        self.outputs, self.gradients, self.full_hooks = by_port["output"], by_port["grad_output"], by_port["grad_input"]
        after: Callable[..., Any] | None = None
        if self.outputs or self.gradients or self.full_hooks:
            after = self._fast() or self.after
        before = self.before if self.inputs or self.input_gradients else None
        full = self.full if self.full_hooks else None
        if full is not None and self.arrived is _NO_CALLS:
            self.arrived, self.without_input = deque(maxlen=MOST_CALLS), deque(maxlen=MOST_CALLS)
        for kind, wanted in (("before", before), ("after", after), ("full", full)):
            if wanted is not None or kind in self.handles:
                self._fit(kind, wanted)

    def _hang_one(self, entry: Entry) -> bool:
        """Hang the usual case on a site that is bare: what `_attend` does, for thousands of modules at each run."""
        hook = entry.hook
        if entry.done or hook.options.prepend or not hook.is_enabled or (quick := self._quick_for(entry)) is None:
            return False
        if entry.spot.port == "output":
            self.outputs = (entry,)
        else:
            self.gradients = (entry,)
        quick.hang(self.module.register_forward_hook, prepend=self.first)
        self.handles["after"] = (quick, quick)
        return True

    def _fast(self) -> Callable[..., Any] | None:
        """Return the quick way for the usual case, one hook without conditions, where this is one."""
        entries = self.outputs + self.gradients + self.full_hooks
        # With hooks on inputs, calls are paired, beginning and end, in `Site.before` and `after`.
        if len(entries) != 1 or self.inputs or self.input_gradients:
            return None
        return self._quick_for(entries[0])

    def _quick_for(self, entry: Entry) -> FastOutput | FastGradient | None:
        """Return what serves an entry alone, if it is without conditions."""
        spot, hook = entry.spot, entry.hook
        if not hook.unconditional or self.runs.threaded or self.replayed:
            return None
        if entry.leaf is not None or spot.view is not None or spot.writing != "replace":
            return None
        if spot.port not in ("output", "grad_output"):
            return None
        quick = self.quick
        if quick is None or quick.entry is not entry:
            kind = FastGradient if spot.port == "grad_output" else FastLook if hook.observes else FastOutput
            self.quick = quick = kind(self, entry)
        return quick

    def _fit(self, kind: str, wanted: Callable[..., Any] | None) -> None:
        old, hook = self.handles.get(kind, (None, None))
        if old == wanted:
            return
        if hook is not None:
            del self.handles[kind]
            hook.take_off()
            if kind == "full" and not self.module._backward_hooks:
                # torch never takes this mark back, and refuses the other kind of backward hook for ever.
                self.module._is_full_backward_hook = self._full_before
        if wanted is None:
            return
        hook = wanted if isinstance(wanted, OwnedHook) else WeakHook.of(wanted, keeps_owner=True)
        self.can_rest = self.can_rest and wanted is self.quick
        if kind == "before":
            hook.hang(self.module.register_forward_pre_hook, with_kwargs=True, prepend=self.first)
        elif kind == "after":
            with_kwargs = wanted == self.after
            hook.hang(self.module.register_forward_hook, with_kwargs=with_kwargs, prepend=self.first)
        else:
            self._full_before = self.module._is_full_backward_hook
            hook.hang(self.module.register_full_backward_hook, prepend=self.first)
        self.handles[kind] = (wanted, hook)

    def take_off(self) -> None:
        if self.front is not None:
            self.front.take_off()
            self.can_rest = False
        self.entries, self.replayed, self.front, self.quick = [], [], None, None
        self.inputs = self.outputs = self.gradients = self.input_gradients = self.full_hooks = ()
        for kind in tuple(self.handles):
            self._fit(kind, None)
        if self.leaf_handles:
            self.can_rest = False
            for handle in self.leaf_handles.values():
                handle.remove()
            self.leaf_handles.clear()

    def lay_down(self) -> None:
        """Let go of the registry, which keeps it for the next hook here: they would hold each other and the model."""
        del self.registry

    def wake(self, registry: Registry) -> None:
        """Begin anew, as a new site would."""
        self.registry, self.key = registry, self.runs.new_key()

    @untraced
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recompute = graph_task_id() != -1
        pairs = "after" in self.handles
        call = self.runs.enter(self.key, recompute, args) if pairs else self.runs.count(self.key, recompute)
        step = self.runs.local.step
        bare = not kwargs and len(args) == 1
        old = args[0] if bare else {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}
        new = old
        for entry in self.inputs:
            if not takes_part(self, entry, step, recompute):
                continue
            entry.seen += 1
            if not entry.hook.options.raw:
                new = run_entry(entry, new, call, step, recompute)
                has_acted(self, entry, call)
                continue
            result = run_raw(entry, RawCall(*_unpacked(new, args, kwargs, bare)), call, step, recompute)
            has_acted(self, entry, call)
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
        if "after" in self.handles:
            self.runs.renamed(self.key, args)
        return args, kwargs

    @untraced
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        recompute = graph_task_id() != -1
        if "before" in self.handles:
            call = self.runs.leave(self.key, recompute, args)
        else:
            call = self.runs.count(self.key, recompute)
        step = self.runs.local.step
        new = output
        for entry in self.outputs:
            if not takes_part(self, entry, step, recompute):
                continue
            entry.seen += 1
            if entry.hook.options.raw:
                result = run_raw(entry, RawCall(args, kwargs, new), call, step, recompute)
                new = new if result is None else result
            else:
                new = run_entry(entry, new, call, step, recompute)
            has_acted(self, entry, call)
        if self.gradients:
            self._place(self.gradients, new, call, step, args)
        if self.full_hooks:
            self._expect(args, new, call, step, recompute)
        return None if new is output else new

    def _expect(self, args: tuple[Any, ...], output: Any, call: int, step: int, recompute: bool) -> None:
        """Prepare for torch's full hooks, which say nothing of the call."""
        for entry in self.full_hooks:
            entry.seen += not recompute
            shade(self, entry, call)
        if torch.is_grad_enabled() and any(follows(self, e, step, recompute) for e in self.full_hooks):
            if not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
                self.without_input.append((call, step))
                return
            for tensor in [t for _, t in tensors_of(output) if t.requires_grad and not t.is_leaf][:1]:
                tensor.register_hook(_Arrival(self, call, step))

    def _place(self, entries: tuple[Entry, ...], tree: Any, call: int, step: int, inputs: tuple[Any, ...] = ()) -> None:
        """Put a hook on the gradient of each tensor of an output (or input)."""
        recompute = graph_task_id() != -1
        wanted = tuple(e for e in entries if follows(self, e, step, recompute))
        for entry in wanted:
            entry.seen += not recompute
            shade(self, entry, call)
        if not wanted or not torch.is_grad_enabled():
            return
        found = [(leaf, tensor) for leaf, tensor in tensors_of(tree) if tensor.requires_grad]
        for number, (leaf, tensor) in enumerate(found):
            here = tuple(e for e in wanted if is_leaf(e.leaf, leaf, number))
            if not here:
                continue
            for entry in here:
                entry.placed += 1
            # Only a bare output is sure to be all that came of its base.
            given = GradientCall(here, call, step, leaf)
            if tree is tensor:
                handle = hook_gradient(tensor, given, inputs, self.module, on_lost=given.lost)
            else:
                handle = hook_view(tensor, given, given.lost)
            if tensor.is_leaf:  # outlives the graph: at most one stays
                previous = self.leaf_handles.pop((leaf, here[0].spot.port), None)
                if previous is not None:
                    previous.remove()
                self.leaf_handles[leaf, here[0].spot.port] = handle

    @untraced
    def full(self, module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        """Torch's full backward hook."""
        waiting = self.arrived if any(isinstance(g, Tensor) for g in grad_input) else self.without_input
        call, step = waiting.pop() if waiting else (0, self.runs.local.step)
        new = grad_input
        for entry in self.full_hooks:
            if not (entry.hook.alive and entry.hook._enabled and entry.hook.wants(step, False, backward=True)):
                continue
            entry.placed += 1
            if entry.hook.options.raw:
                result = run_raw(entry, RawCall(new, {}, grad_output), call, step, False)
                new = new if result is None else result
            else:
                new = run_entry(entry, new, call, step, False, guarded=True)
        return None if new is grad_input else new


def _unpacked(tree: Any, args: tuple[Any, ...], kwargs: dict[str, Any], bare: bool) -> tuple[Any, Any]:
    if bare:
        return (tree,), {}
    return tuple(tree[str(i)] for i in range(len(args))), {key: tree[key] for key in kwargs}
