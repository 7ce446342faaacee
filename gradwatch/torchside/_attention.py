"""Attention as it is computed, found among the torch functions that a module's call makes: fused, or step by step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ._aside import Aside, in_transform
from ._autograd import in_backward
from ._inert import WeakHook
from ._members import member
from ._modes import CallMode, past_override
from ._untraced import is_traced, untraced

__all__ = ["PRODUCTS", "Attended", "AttentionTap", "attended_fused", "heads_of"]

PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "__matmul__"})
_INSIDE = "multi_head_attention_forward"
"""Python function of torch that calls what attention is made of."""
_FUSED = "scaled_dot_product_attention"
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")


class Attended(NamedTuple):
    """One attention, before its softmax, as the model holds it.

    Attributes:
        q, k: queries (..., queries, width) and keys (..., keys, width), heads before the positions. Step by step what
            was multiplied: one of them may be scaled already.
        mask: True where a query may look, or what is added to the scores; None: everywhere.
        is_causal: a query looks at no key that comes after it.
        scale: of the products; None: one over the root of the width.
        scores: what the softmax is taken of, where the model computes it step by step; mask and scale are in it.
        heads: of queries, as the module says; None where it does not.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    scores: Tensor | None = None
    heads: int | None = None


def attended_fused(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Attended, dict[str, Any]]:
    """Return what a call of torch's fused attention attends to, and all that it was given, by name."""
    given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
    found = Attended(
        given["query"],
        given["key"],
        given.get("attn_mask"),
        bool(given.get("is_causal", False)),
        given.get("scale"),
    )
    return found, given


def heads_of(module: nn.Module) -> tuple[int | None, int]:
    """Return how many heads a module, or its config, says that it has (None where it does not say), and how many of
    these share one head of keys and values."""
    config = member(module, "config")
    heads = next(
        (n for holder in (module, config) for name in _COUNTS if type(n := getattr(holder, name, None)) is int), None
    )
    groups = getattr(module, "num_key_value_groups", None)
    if type(groups) is not int:
        few = getattr(config, "num_key_value_heads", None)
        groups = heads // few if heads and type(few) is int and few and heads % few == 0 else 1
    return heads, max(groups, 1)


class AttentionTap:
    """Shows each attention within the calls of some modules to a listener, under the innermost of them.

    A torch function mode is in force for the time of their calls, and sees `scaled_dot_product_attention`, or a product
    and a softmax of it. The functions are called as they were: nothing of the model's changes. A forward that
    activation checkpointing repeats is not shown again, nor what runs inside a `torch.func` transform. What is computed
    otherwise (kernels of other libraries, flex attention, compiled modules) is not seen.

    Args:
        modules: by the path that the listener is told.
        listener: called with path and attention, beside the user's graph and modes; it must keep none of it.
        gate: asked at every call; while it says False nothing is seen.

    Attributes:
        seen: paths of the modules that have attended.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        listener: Callable[[str, Attended], object],
        gate: Callable[[], bool] = lambda: True,
    ) -> None:
        self._modules, self._listener, self._gate = dict(modules), listener, gate
        self._handles: list[Any] = []
        self._local = _Local()
        self.seen: set[str] = set()

    @property
    def is_open(self) -> bool:
        return bool(self._handles)

    def open(self) -> None:
        """Hang the hooks; on all modules, or on none if one registration fails. Opened again, nothing."""
        if self._handles:
            return
        try:
            for path, module in self._modules.items():
                before, after = WeakHook(self, AttentionTap._before, path), WeakHook(self, AttentionTap._after)
                self._handles.append(before.hang(module.register_forward_pre_hook))
                self._handles.append(after.hang(module.register_forward_hook, prepend=True, always_call=True))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take the hooks off. May be called twice."""
        while self._handles:
            self._handles.pop().remove()
        self._local = _Local()

    @untraced
    def _before(self, path: str, module: nn.Module, args: Any) -> None:
        local = self._local
        if local.ear is not None and local.ear.is_over():
            # Its call was broken off, in a way that torch tells no hook of.
            local.ear, local.stack = None, []
        if in_backward() or in_transform() or is_traced() or not self._gate():
            local.stack.append(None)
            return
        local.stack.append(_Calling(self, path, module))
        if local.ear is None:
            local.ear = _Ear(self)
            local.ear.open(above=2)

    @untraced
    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        local = self._local
        if local.stack:
            local.stack.pop()
        if local.ear is not None and not any(local.stack):
            local.ear = None
            CallMode.close(self)

    def calling(self) -> _Calling | None:
        """Return the innermost call that is listened to in this thread."""
        return self._local.stack[-1] if self._local.stack else None

    def tell(self, path: str, attended: Attended) -> None:
        """Show an attention to the listener."""
        self.seen.add(path)
        with Aside():
            self._listener(path, attended)


class _Local(threading.local):
    """What goes on in one thread: the calls that have begun, the innermost last, and the mode for the outermost."""

    def __init__(self) -> None:
        self.stack: list[_Calling | None] = []
        self.ear: _Ear | None = None


class _Ear(CallMode):
    """Hands each function on to what is known of the innermost call."""

    owner: AttentionTap

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calling = self.owner.calling()
        if calling is None:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == _INSIDE:
            with self:
                return past_override(func)(*args, **kwargs)
        if name == _FUSED:
            calling.fused(args, kwargs)
        elif name == "softmax":
            calling.softmax(args[0] if args else kwargs.get("input"))
        elif name in PRODUCTS:
            out = func(*args, **kwargs)
            calling.product(name, args, kwargs, out)
            return out
        return func(*args, **kwargs)


class _Calling:
    """One call of a module: the last product in it, of which a softmax may follow."""

    def __init__(self, tap: AttentionTap, path: str, module: nn.Module) -> None:
        self._tap, self._path, self._module = tap, path, module
        self._product: tuple[Any, Any, Any] | None = None

    def fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found, _ = attended_fused(args, kwargs)
        if not found.q.is_nested:
            self._tap.tell(self._path, found._replace(heads=heads_of(self._module)[0]))

    def product(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        names = ("input", "batch1", "batch2") if name == "baddbmm" else ("input", "other")
        given = [*args, *(kwargs[n] for n in (*names, "mat2", "tensor2") if n in kwargs)]
        known = len(given) >= 2 and all(_is_batched(t) for t in (given[-2], given[-1], out))
        self._product = (given[-2].detach(), given[-1].detach(), out.shape) if known else None

    def softmax(self, scores: Any) -> None:
        if self._product is None or not isinstance(scores, Tensor):
            return
        left, right, shape = self._product
        if scores.shape[-2:] != shape[-2:] or scores.numel() != shape.numel():
            return
        self._product = None
        heads = heads_of(self._module)[0]
        found = Attended(left, right.transpose(-1, -2), scale=1.0, scores=scores.detach(), heads=heads)
        self._tap.tell(self._path, found)


def _is_batched(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dim() >= 3 and not isinstance(tensor, nn.Parameter)
