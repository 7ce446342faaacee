"""Attention laid open: queries, keys, values, scores, pattern and z of whatever attends within a module's call.

The tensors are no module's input or output. While a hook is at one of them, a torch function mode is in force for the
time of the module's call, and sees the functions that attention is made of: a fused `scaled_dot_product_attention`, or
a product, a softmax and a second product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..torchside import PRODUCTS, CallMode, WeakHook, member, past_override, untraced
from ._attention_forms import AS_IT_IS, Form, Geometry, but_sinks, geometry_of
from ._dispatch import GradientCall, follows, has_acted, run_entry, shade, sorted_entries, takes_part
from ._einsum import Contraction, Orders, contraction, operands, turned
from ._fused import Fused
from ._hook import Entry
from ._points import ATTENTION_PORTS, GRADIENT_OF
from ._results import acts, asks_for_gradients, head_results, rewrites, summed
from ._runs import Runs, graph_task_id

__all__ = ["AttentionSite"]

_CASTS = frozenset({"to", "type", "type_as", "half", "bfloat16", "float"})
_NESTED = (
    "it attended to a nested tensor, in a kernel of torch's own: nn.TransformerEncoder(enable_nested_tensor=False)"
)
_CONTAINS_ATTENTION = frozenset({"multi_head_attention_forward"})
"""Python functions of torch that call what attention is made of."""


class AttentionSite:
    """The hooks of one manager on the attention within one module."""

    def __init__(self, path: str, module: nn.Module, runs: Runs, registry: Any = None) -> None:
        self.path, self.module, self.runs = path, module, runs
        self.entries: list[Entry] = []
        self.replayed: list[Entry] = []
        self.key = runs.new_key()
        self.by_port: dict[str, tuple[Entry, ...]] = {}
        self.handles: list[Any] = []

    def refresh(self) -> None:
        ports = [*ATTENTION_PORTS, *(GRADIENT_OF[port] for port in ATTENTION_PORTS)]
        self.by_port = {port: found for port in ports if (found := sorted_entries(self.entries, port, self.replayed))}
        if self.by_port and not self.handles:
            before, after = WeakHook.of(self.before, keeps_owner=True), WeakHook.of(self.after, keeps_owner=True)
            self.handles.append(before.hang(self.module.register_forward_pre_hook, with_kwargs=True))
            self.handles.append(after.hang(self.module.register_forward_hook, prepend=True, always_call=True))
        elif not self.by_port:
            while self.handles:
                self.handles[-1].remove()
                self.handles.pop()

    def take_off(self) -> None:
        self.entries, self.replayed = [], []
        self.refresh()

    @untraced
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recompute = graph_task_id() != -1
        step = self.runs.local.step
        given = (*args, *kwargs.values())
        if any(isinstance(t, Tensor) and t.is_nested for t in given):
            # torch attends to these in its fast path alone, which a function mode would switch off.
            for entry in (e for entries in self.by_port.values() for e in entries):
                entry.seen += not recompute
                entry.note = entry.note if entry.fired else _NESTED
            return
        wanted = {
            port: found
            for port, entries in self.by_port.items()
            if (
                found := tuple(
                    e for e in entries if (takes_part if port in ATTENTION_PORTS else follows)(self, e, step, recompute)
                )
            )
        }
        for entries in wanted.values():
            for entry in entries:
                entry.seen += not recompute
                entry.note = entry.note if entry.fired else "nothing attended in its call, in a way that is known"
        if wanted:
            dtype = next((t.dtype for t in given if isinstance(t, Tensor) and t.is_floating_point()), None)
            # Above this method stands the hook that called it, and above that the module's call.
            _Attending(self, wanted, step, recompute, dtype).open(above=2)

    @untraced
    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        CallMode.close(self)


class _Attending(CallMode):
    """Finds what attends in one call of a module, and shows it to the hooks."""

    def __init__(
        self, site: AttentionSite, wanted: dict[str, tuple[Entry, ...]], step: int, recompute: bool, dtype: Any
    ) -> None:
        super().__init__(site)
        self.site, self.wanted, self.step, self.recompute, self.dtype = site, wanted, step, recompute, dtype
        self.geometry: Geometry = geometry_of(site.module)
        self.call = 0
        self.changed = False
        self.scores: torch.Size | None = None
        self.pattern: torch.Size | None = None
        self.uncast: Tensor | None = None
        self.within = ""
        self.scaled: Tensor | None = None
        self.mixed: Tensor | None = None

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._fused(func, args, kwargs)
        if name in PRODUCTS:
            return self._product(func, args, kwargs)
        if name == "einsum" and (product := contraction(func, args)) is not None:
            return self._einsum(product, func, args)
        if name == "softmax":
            return self._softmax(func, args, kwargs)
        if name in _CONTAINS_ATTENTION:
            return self._inside(func, args, kwargs)
        if self.within and name in ("mul", "linear", "view"):
            return self._step_within(name, func, args, kwargs)
        if self.uncast is not None:
            return self._cast(name, func, args, kwargs)
        return func(*args, **kwargs)

    # -- what the hooks are shown

    def _acts(self, port: str) -> bool:
        """Return whether anything at a port needs to stand in the graph."""
        return GRADIENT_OF[port] in self.wanted or any(acts(e) for e in self.wanted.get(port, ()))

    def _rewrites(self, *ports: str) -> bool:
        return any(rewrites(e) for port in ports for e in self.wanted.get(port, ()))

    def has(self, port: str) -> bool:
        return port in self.wanted or GRADIENT_OF[port] in self.wanted

    def opens(self, port: str) -> bool:
        """Return whether a gradient is asked for at a port, so that a fused function must be taken apart."""
        if not torch.is_grad_enabled():
            return False
        asked = any(asks_for_gradients(e) for e in self.wanted.get(port, ()))
        return asked or GRADIENT_OF[port] in self.wanted

    def visit(self, port: str, tensor: Tensor, form: Form) -> Tensor:
        """Show a tensor to the hooks at a port; return what the model goes on with. Notes in `changed` a change."""
        if not self.has(port):
            return tensor
        shown = new = form.show(tensor)
        version = -1 if shown.is_inference() else shown._version
        for entry in self.wanted.get(port, ()):
            new = run_entry(entry, new, self.call, self.step, self.recompute)
            has_acted(self.site, entry, self.call)
        self.changed |= new is not shown or version != (-1 if shown.is_inference() else shown._version)
        self._place(port, new)
        return form.back(new, tensor) if new is not shown or self._acts(port) else tensor

    def _place(self, port: str, tensor: Tensor) -> None:
        entries = self.wanted.get(GRADIENT_OF[port], ())
        for entry in entries:
            shade(self.site, entry, self.call)
        if entries and tensor.requires_grad:
            for entry in entries:
                entry.placed += 1
            tensor.register_hook(GradientCall(entries, self.call, self.step, ""))

    def _begin(self) -> None:
        self.call = self.site.runs.count(self.site.key, self.recompute)
        self.scores = self.pattern = self.uncast = None

    # -- in one fused function

    def _fused(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._begin()
        found = Fused.of(func, args, kwargs)
        form = self.geometry.fused(found.q, found.k)
        found.q = self.visit("q", found.q, form.rows)
        found.k = self.visit("k", found.k, form.columns(found.k))
        found.v = self.visit("v", found.v, form.columns(found.v))
        if self.has("peak"):
            with torch.no_grad():
                self._show_peak(found.largest(), form.pairs)
        z = self._laid_open(found, form.pairs) if self.has("scores") or self.has("pattern") else found.run()
        self.mixed = z = self.visit("z", z, form.rows)
        return z

    def _show_peak(self, scores: Tensor, form: Form) -> None:
        self.visit("peak", form.show(scores).amax(dim=(-2, -1)), AS_IT_IS)

    def _laid_open(self, found: Fused, form: Form) -> Tensor:
        opened = self.opens("scores") or self.opens("pattern")
        self.changed = False
        rewriting = self._rewrites("scores", "pattern")
        with torch.set_grad_enabled(torch.is_grad_enabled() and (opened or rewriting)):
            scores = self.visit("scores", found.scores(), form)
            if not (self.has("pattern") or self.changed or opened):
                return found.run()
            pattern = self.visit("pattern", found.pattern(scores), form)
        return found.mixed(pattern) if (self.changed and rewriting) or opened else found.run()

    # -- step by step

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = ("input", "batch1", "batch2") if func.__name__ == "baddbmm" else ("input", "other")
        given = [*args, *(kwargs.pop(n) for n in (*names, "mat2", "tensor2") if n in kwargs)]
        left: Any = given[-2] if len(given) >= 2 else None
        right: Any = given[-1] if given else None
        if not (_is_batched(left) and _is_batched(right)):
            return func(*given, **kwargs)
        if self.pattern is not None and _same(left.shape, self.pattern):
            form = self.geometry.stepwise(left)
            if self.uncast is not None:  # no cast came before: shown here
                self.uncast = None
                given[-2] = self.visit("pattern", left, form.pairs)
            given[-1] = self.visit("v", right, form.columns(right))
            self.pattern = None
            self.mixed = self.visit("z", func(*given, **kwargs), form.rows)
            return self.mixed
        if self.pattern is not None:
            return func(*given, **kwargs)
        self._begin()
        form = self.geometry.stepwise(left)
        if left is not self.scaled:
            given[-2] = self.visit("q", left, form.rows)
        given[-1] = self.visit("k", right.transpose(-1, -2), form.columns(right)).transpose(-1, -2)
        scores = func(*given, **kwargs)
        self.scores = scores.shape
        return scores

    def _einsum(self, product: Contraction, func: Any, args: tuple[Any, ...]) -> Any:
        given = operands(args)
        if given is None:
            return func(*args)
        left, right = given
        if self.pattern is None:
            orders = product.of_scores
            return func(*args) if orders is None else self._scores(func, args[0], left, right, orders)
        orders = product.of_values if _same(left.shape, self.pattern) else None
        return func(*args) if orders is None else self._values(func, args[0], left, right, orders)

    def _scores(self, func: Any, equation: str, q: Tensor, k: Tensor, orders: Orders) -> Tensor:
        self._begin()
        one, other = orders
        form = self.geometry.stepwise(q.permute(one))
        q = self.visit("q", q, turned(one, form.rows))
        k = self.visit("k", k, turned(other, form.columns(k.permute(other))))
        scores: Tensor = func(equation, q, k)
        self.scores = scores.shape
        return scores

    def _values(self, func: Any, equation: str, pattern: Tensor, v: Tensor, orders: Orders) -> Tensor:
        one, other = orders
        form = self.geometry.stepwise(pattern)
        if self.uncast is not None:
            self.uncast = None
            pattern = self.visit("pattern", pattern, form.pairs)
        v = self.visit("v", v, turned(one, form.columns(v.permute(one))))
        self.pattern = None
        self.mixed = self.visit("z", func(equation, pattern, v), turned(other, form.rows))
        return self.mixed

    def _softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scores = args[0] if args else kwargs.pop("input")
        if self.scores is None or not _same(scores.shape[:-1], self.scores[:-1]):
            return func(scores, *args[1:], **kwargs)
        form, keys = self.geometry.stepwise(scores).pairs, self.scores[-1]
        if scores.shape[-1] == keys + 1:
            form = but_sinks(form, keys)
        scores = self.visit("scores", scores, form)
        if self.has("peak"):
            with torch.no_grad():
                self._show_peak(scores, form)
        pattern = func(scores, *args[1:], **kwargs)
        self.scores, self.pattern = None, torch.Size((*pattern.shape[:-1], min(pattern.shape[-1], keys)))
        if self.dtype is not None and pattern.dtype != self.dtype and pattern.dtype == torch.float32:
            self.uncast = pattern  # shown when it is cast to what the model computes in
            return pattern
        return self.visit("pattern", pattern, form)

    def _cast(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if name in _CASTS and args and args[0] is self.uncast:
            self.uncast = None
            return self.visit("pattern", out, self.geometry.stepwise(out).pairs)
        return out

    # -- within torch's own attention function

    def _inside(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.within = func.__name__
        try:
            with self:
                return past_override(func)(*args, **kwargs)
        finally:
            self.within, self.scaled, self.mixed = "", None, None

    def _step_within(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "mul" and _is_batched(args[0]) and not isinstance(args[1], Tensor):
            # The queries, before they are scaled.
            form = self.geometry.stepwise(args[0])
            self.scaled = func(self.visit("q", args[0], form.rows), *args[1:], **kwargs)
            return self.scaled
        out = func(*args, **kwargs)
        weight = getattr(member(self.site.module, "out_proj"), "weight", None)
        if name == "linear" and self.mixed is not None and len(args) > 1 and args[1] is weight and self.has("result"):
            return self._result(out, args)
        return out

    def _result(self, out: Tensor, args: tuple[Any, ...]) -> Tensor:
        opened = self.opens("result")
        with torch.set_grad_enabled(torch.is_grad_enabled() and (opened or self._rewrites("result"))):
            results = head_results(args[0], args[1], self.geometry.heads or 1)
            self.changed = False
            new = self.visit("result", results, self.geometry.results(self.mixed))
        if (self.changed and self._rewrites("result")) or opened:
            return summed(new, args[2] if len(args) > 2 else None, out)
        return out


def _is_batched(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dim() >= 3 and not isinstance(tensor, nn.Parameter)


def _same(one: torch.Size, other: torch.Size) -> bool:
    """Return whether two shapes are the same but for a split of the first dimension."""
    return one.numel() == other.numel() and one[-1:] == other[-1:]
