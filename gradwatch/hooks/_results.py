"""What each head adds to attention's output: the output projection, head by head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..torchside import WeakHook, member, untraced
from ._dispatch import GradientCall, follows, has_acted, run_entry, shade, sorted_entries, takes_part
from ._hook import Entry
from ._runs import Runs, graph_task_id

__all__ = ["ResultSite", "acts", "asks_for_gradients", "head_results", "rewrites", "summed"]


def head_results(z: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Return (..., heads, width): of z (..., heads * d) and a weight of shape (width, heads * d)."""
    return torch.einsum("...hd,ohd->...ho", z.unflatten(-1, (heads, -1)), weight.unflatten(-1, (heads, -1)))


def summed(results: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """Return the output that heads add up to."""
    total = results.sum(dim=-2).to(like.dtype)
    return total if bias is None else total + bias


def acts(entry: Entry) -> bool:
    """Return whether what is shown must be what the model goes on with: for all but those that only look."""
    return not entry.hook.observes and getattr(entry.hook.fn, "in_graph", True)


def rewrites(entry: Entry) -> bool:
    """Return whether a hook may also have its way where the model's own computation must be taken apart for it."""
    return acts(entry) and getattr(entry.hook.fn, "lays_open", True)


def asks_for_gradients(entry: Entry) -> bool:
    return getattr(entry.hook.fn, "lays_open", False)


class ResultSite:
    """The hooks of one manager on the heads' shares in what one output projection gives.

    The model adds all heads up in one product. What is shown is computed beside it; the sum takes the product's place
    only where a hook changes a share, or a gradient is asked for.
    """

    def __init__(self, path: str, module: nn.Module, runs: Runs, registry: Any = None) -> None:
        self.path, self.module, self.runs = path, module, runs
        self.entries: list[Entry] = []
        self.replayed: list[Entry] = []
        self.key = runs.new_key()
        self.shares: tuple[Entry, ...] = ()
        self.gradients: tuple[Entry, ...] = ()
        self.handle: Any = None

    def refresh(self) -> None:
        self.shares, self.gradients = (
            sorted_entries(self.entries, p, self.replayed) for p in ("result", "grad_at_result")
        )
        wanted = bool(self.shares or self.gradients)
        if wanted and self.handle is None:
            self.handle = WeakHook.of(self.after, keeps_owner=True).hang(
                self.module.register_forward_hook, prepend=True
            )
        elif not wanted and self.handle is not None:
            self.handle.remove()
            self.handle = None

    def take_off(self) -> None:
        self.entries, self.replayed = [], []
        self.refresh()

    @untraced
    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        recompute = graph_task_id() != -1
        call, step = self.runs.count(self.key, recompute), self.runs.local.step
        wanted = tuple(e for e in self.shares if takes_part(self, e, step, recompute))
        grads = tuple(e for e in self.gradients if follows(self, e, step, recompute))
        for entry in (*wanted, *grads):
            entry.seen += not recompute
        for entry in grads:
            shade(self, entry, call)
        if not (wanted or grads):
            return None
        weight = weight_of(module, args, output)
        heads = next(e.spot.heads for e in (*wanted, *grads))
        if weight is None or not heads or args[0].shape[-1] % heads:
            for entry in (*wanted, *grads):
                entry.note = f"{type(module).__name__} is no plain projection: its heads can't be told apart"
            return None
        grad = torch.is_grad_enabled()
        opened = grad and bool(grads or any(asks_for_gradients(e) for e in wanted))
        acting = opened or any(rewrites(e) for e in wanted)
        with torch.set_grad_enabled(grad and acting):
            results = new = head_results(args[0], weight, heads)
            version = results._version if not results.is_inference() else -1
            for entry in wanted:
                new = run_entry(entry, new, call, step, recompute)
                has_acted(self, entry, call)
            if grads and new.requires_grad:
                for entry in grads:
                    entry.placed += 1
                new.register_hook(GradientCall(grads, call, step, ""))
            changed = new is not results or version != (results._version if not results.is_inference() else -1)
            if not ((changed and acting) or opened):
                return None
            return summed(new, member(module, "bias"), output)


def weight_of(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    """Return a projection's weight as (out, in); None where the module is not one."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and isinstance(weight, Tensor)):
        return None
    if type(module) is nn.Linear:
        return weight
    if weight.dim() != 2:
        return None
    # Told by what it does: a Conv1D has its weight the other way round, and may be square.
    with torch.no_grad():
        for turned in (weight, weight.t()):
            if turned.shape != (output.shape[-1], args[0].shape[-1]):
                continue
            if torch.allclose(F.linear(args[0], turned, bias).float(), output.float(), rtol=1e-2, atol=1e-3):
                return turned
    return None
