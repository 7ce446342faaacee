"""Names for what one attention is made of, by how the model itself takes its projections apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from ..torchside import storage_identity
from ._aliases import Unavailable
from ._dataflow import PLAIN, Flow, Route
from ._trace import Attend, Call
from ._views import Heads, PositionsFirst, Strided, View

__all__ = ["Found", "Meanings", "attention_names"]

_NOT_ROTATED = "no rotation enters queries and keys"
_NOT_APART = "the model takes its projection apart in a way that no view shows: read them at hook_rot_{letter}"


@dataclass(frozen=True)
class Found:
    """Where a name leads."""

    path: str
    port: str = "output"
    leaf: str | None = None
    view: View | None = None
    writing: str = "replace"
    heads: int | None = None


Meanings = dict[str, Any]
"""Name -> `Found`, or `Unavailable`."""


def attention_names(flow: Flow, attend: Attend, prefix: str) -> Meanings:
    """Return the names of one attention of a block: `attn.hook_q`, ..."""
    return _Attention(flow, attend, prefix).names()


class _Attention:
    """One attention of a block."""

    def __init__(self, flow: Flow, attend: Attend, prefix: str) -> None:
        self.flow, self.attend, self.prefix = flow, attend, prefix
        self.seen = flow.seen
        self.width = self.seen.tensors[attend.q].shape[-1]

    def names(self) -> Meanings:
        a, p = self.attend, self.prefix
        routes = {"q": self.flow.route(a.q), "k": self.flow.route(a.k), "v": self.flow.route(a.v)}
        found: Meanings = {}
        rotated = {x for x, one in (("q", a.q), ("k", a.k)) if self._is_rotated(one)}
        for letter, route in routes.items():
            view = None if route is None else self._shown(route, letter)
            at_port: Any = Found(a.path, letter)
            if letter in rotated:
                at_port = Unavailable(_NOT_APART.format(letter=letter))
            found[f"{p}.hook_{letter}"] = at_port if view is None else view
        for letter in "qk":
            at_port = Found(a.path, letter) if letter in rotated else Unavailable(_NOT_ROTATED)
            found[f"{p}.hook_rot_{letter}"] = at_port
        found[f"{p}.hook_attn_scores"] = Found(a.path, "scores")
        found[f"{p}.hook_pattern"] = Found(a.path, "pattern")
        found.update(self._after())
        return found

    def _after(self) -> Meanings:
        a, p = self.attend, self.prefix
        z = self.seen.tensors[a.z]
        heads = self._heads(z)
        call = next(
            (c for c in self.flow.calls if c.begin > a.when and self._is_fed(c)),
            None,
        )
        turned = None if call is None else self._is_turned(self.seen.tensors[call.inputs[0][1]], "z")
        if call is not None and heads and turned is not None:
            mixed: View = PositionsFirst(Heads(heads)) if turned else Heads(heads)
            apart = PositionsFirst() if turned else None
            return {
                f"{p}.hook_z": Found(call.path, "input", view=mixed),
                f"{p}.hook_result": Found(call.path, "result", heads=heads, view=apart),
            }
        own = next(c for c in self.seen.calls if c.path == a.path)
        if isinstance(own.module, torch.nn.MultiheadAttention):
            return {f"{p}.hook_z": Found(a.path, "z"), f"{p}.hook_result": Found(a.path, "result")}
        reason = "no projection takes the heads' values as they are"
        return {f"{p}.hook_z": Found(a.path, "z"), f"{p}.hook_result": Unavailable(reason)}

    def _is_fed(self, call: Call) -> bool:
        """Return whether a projection takes z, with nothing done to it but moving it about."""
        weight = getattr(call.module, "weight", None)
        if not (isinstance(weight, torch.Tensor) and weight.dim() == 2 and len(call.inputs) == 1):
            return False
        one: int | None = call.inputs[0][1]
        while one is not None and one != self.attend.z:
            op = self.flow.op_of(one)
            one = op.inputs[0] if op is not None and op.name in PLAIN else None
        return one is not None

    def _heads(self, z: torch.Tensor) -> int | None:
        if self.attend.heads is not None:
            return self.attend.heads
        q = self.flow.route(self.attend.q)
        if z.dim() == 3 and q is not None:
            held = self.seen.tensors[q.projection.outputs[0][1]]
            return z.shape[0] // held.shape[1 if self._is_turned(held, "q") else 0]
        return None

    def _view(self, route: Route) -> Found | None:
        """Return the projection's output with heads apart, told by how the model itself takes it apart."""
        whole = self.seen.tensors[route.projection.outputs[0][1]]
        part = self._part_of(whole, route.ids[-1])
        total, width = whole.shape[-1], self.width
        if not whole.is_contiguous():
            return None
        if part is None:
            view = self._view_of_copy(whole, route)
            return None if view is None else Found(route.projection.path, view=view)
        offset = int(part.storage_offset() - whole.storage_offset()) % total
        if part.dim() == 4:
            apart = zip(part.shape[:-1], part.stride()[:-1], strict=True)
            inner = [(size, stride) for size, stride in apart if size > 1 and stride < total]
            heads, step = inner[0] if inner else (1, width)
        else:
            heads, step = part.shape[-1] // width, width
        return Found(route.projection.path, view=_heads_view(heads, width, offset, step, total))

    def _part_of(self, whole: torch.Tensor, end: int) -> torch.Tensor | None:
        """Return the last part of a projection on the way to a tensor; with heads apart, where there is one.

        None where the way takes but some of the last part: those numbers were copied.
        """
        found: list[tuple[int, int, torch.Tensor]] = []
        for one in (*self.flow.needs.get(end, ()), end):
            part = self.seen.tensors[one]
            if storage_identity(part)[0] != storage_identity(whole)[0] or part.stride(-1) != 1:
                continue
            if part.dim() == 4 and part.shape[-1] == self.width:
                found.append((1, self.seen.maker.get(one, -1), part))
            elif part.shape[:-1] == whole.shape[:-1] and part.shape[-1] % self.width == 0:
                found.append((0, self.seen.maker.get(one, -1), part))
        last = max(found, key=lambda entry: entry[:2])[2] if found else None
        return None if last is None or last.numel() > self.seen.tensors[end].numel() else last

    def _view_of_copy(self, whole: torch.Tensor, route: Route) -> View | None:
        """Return what shows some of a projection's heads that were copied (`fused[..., [-1], :]`): by their numbers."""
        total, width = whole.shape[-1], self.width
        if total % width:
            return None
        apart = whole.unflatten(-1, (-1, width)).flatten(0, -3)
        for one in route.ids[1:]:
            copied = self.seen.tensors[one]
            if copied.shape[: whole.dim() - 1] != whole.shape[:-1] or copied.shape[-1] != width:
                continue
            if copied.numel() >= whole.numel():
                continue
            heads = copied.reshape(len(apart), -1, width)
            places = [
                next((i for i in range(apart.shape[1]) if torch.equal(apart[:, i], heads[:, head])), -1)
                for head in range(heads.shape[1])
            ]
            steps = {after - before for before, after in pairwise(places)} or {1}
            if -1 not in places and len(steps) == 1 and min(steps) > 0:
                return _heads_view(len(places), width, places[0] * width, steps.pop() * width, total)
        return None

    def _is_rotated(self, end: int) -> bool:
        """Return whether something from outside enters on the way from the projections: sines and cosines."""
        starts, after = self.flow.ways(end)
        norms = {call.path for call in self.flow.normed.values()}
        for one in after:
            op = self.flow.op_of(one)
            if op is None or op.path in norms:
                continue
            others = [self.seen.tensors[i] for i in op.inputs if i not in starts and i not in after]
            if any(_is_wide(tensor) for tensor in others):
                return True
        return False

    def _positions(self, letter: str) -> int:
        """Return how many positions there are of queries, or of keys and values."""
        return self.attend.queries if letter in "qz" else self.attend.keys

    def _is_turned(self, held: torch.Tensor, letter: str) -> bool | None:
        """Return whether a projection's (.., .., features) have positions before the batch; None: in neither way."""
        if held.dim() != 3:
            return None
        positions = self._positions(letter)
        if held.shape[1] == positions:
            return False
        return True if held.shape[0] == positions else None

    def _shown(self, route: Route, letter: str) -> Found | None:
        """Return the projection's output as (batch, positions, heads, width); None where no view shows it so."""
        turned = self._is_turned(self.seen.tensors[route.projection.outputs[0][1]], letter)
        found = None if turned is None else self._view(route)
        return found if found is None or not turned else replace(found, view=PositionsFirst(found.view))


def _is_wide(tensor: torch.Tensor) -> bool:
    is_number = tensor.is_floating_point() or tensor.is_complex()
    return is_number and tensor.dim() > 1 and not isinstance(tensor, torch.nn.Parameter)


def _heads_view(heads: int, width: int, offset: int, step: int, total: int) -> View:
    """Return the simplest view that shows a part of a projection's output."""
    size = heads * width
    if step == width and offset % size == 0 and total % size == 0:
        return Heads(heads, part=offset // size, parts=total // size)
    return Strided(heads, width, offset, step)
