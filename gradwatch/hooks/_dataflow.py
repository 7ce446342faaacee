"""What came of what, within one block of a traced model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..torchside import storage_identity
from ._trace import Call, Op, Trace

__all__ = ["Flow", "Route", "Step"]

_SUMS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
PLAIN = frozenset(
    [
        "to",
        "type",
        "type_as",
        "float",
        "half",
        "bfloat16",
        "contiguous",
        "view",
        "reshape",
        "transpose",
        "permute",
        "flatten",
        "unflatten",
        "dropout",
        "clamp",
        "chunk",
        "split",
        "__getitem__",
        "unsqueeze",
        "squeeze",
        "expand",
        "clone",
        "narrow",
        "unbind",
        "movedim",
        "swapaxes",
        "view_as",
    ]
)
"""Functions that move numbers about, and compute none."""


@dataclass(frozen=True)
class Route:
    """From a tensor back to the projection that it comes from; `ids` begin with the projection's output."""

    projection: Call
    ids: tuple[int, ...]
    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Step:
    """One addition to the residual stream: what was added to what, what came of it, and the norm of that, if any."""

    stream: int
    addends: tuple[int, ...]
    total: int
    norm: Call | None


class Flow:
    """The tensors of one call: of a block, or of the whole model.

    Attributes:
        needs: id of a tensor -> ids of all that it was computed from, as far as this call.
    """

    def __init__(self, seen: Trace, call: Call) -> None:
        self.seen, self.call = seen, call
        self.calls = [c for c in seen.calls if call.begin <= c.begin and c.end <= call.end and c is not call]
        paths = [c.path for c in self.calls]
        self.once = {path for path in paths if paths.count(path) == 1}
        self.needs: dict[int, set[int]] = {}
        self._copied: dict[int, list[Op]] = {}  # into memory, by what it is
        held: dict[int, set[int]] = {}
        for op in seen.ops[call.begin : call.end]:
            sources = set(op.inputs)
            for one in op.inputs:
                sources |= self.needs.get(one, set())
            for one in op.outputs:
                if one not in op.inputs:
                    self.needs.setdefault(one, sources)
                memory = self._memory(one)
                held.setdefault(memory, set()).add(one)
                if op.name == "copy_":
                    self._copied.setdefault(memory, []).append(op)
                    for other in held[memory]:
                        self.needs.setdefault(other, set()).update(sources - {other})
        self.projected = {c.outputs[0][1]: c for c in self.calls if c.outputs and is_projection(c)}
        self.normed = {c.outputs[0][1]: c for c in self.calls if self.is_norm(c)}

    def tensor(self, one: int) -> Tensor:
        return self.seen.tensors[one]

    def _memory(self, one: int) -> int:
        return storage_identity(self.seen.tensors[one])[0]

    def is_norm(self, call: Call) -> bool:
        """Return whether a call is that of a norm: by its parameters, which are vectors, or by its class's name."""
        if not (call.is_leaf and len(call.inputs) == 1 and len(call.outputs) == 1):
            return False
        (_, given), (_, out) = call.inputs[0], call.outputs[0]
        if given == out or self.tensor(given).shape != self.tensor(out).shape:
            return False
        weights = list(call.module.parameters(recurse=False))
        named = "norm" in type(call.module).__name__.lower()
        return named or bool(weights and all(w.dim() == 1 and w.numel() > 1 for w in weights))

    def op_of(self, one: int) -> Op | None:
        """Return the function that made a tensor within the call."""
        number = self.seen.maker.get(one)
        return self.seen.ops[number] if number is not None and self.call.begin <= number < self.call.end else None

    def is_moved(self, one: int, source: int) -> bool:
        """Return whether a tensor is another one, with nothing done to it but moving it about."""
        while one != source:
            op = self.op_of(one)
            if op is None or op.name not in PLAIN:
                return False
            one = op.inputs[0]
        return True

    def emitted(self, one: int, *, before: int | None = None) -> Call | None:
        """Return the outermost of the calls that gave a tensor out last, of modules that are called but once."""
        found = [
            c
            for c in self.calls
            if c.path in self.once and any(i == one for _, i in c.outputs) and (before is None or c.end <= before)
        ]
        return max(found, key=lambda c: (c.end, -c.path.count("."))) if found else None

    def taken(self, one: int, *, after: int = 0) -> Call | None:
        """Return the first call that took a tensor as its first."""
        return next(
            (c for c in self.calls if c.begin >= after and c.path in self.once and c.inputs and c.inputs[0][1] == one),
            None,
        )

    def num_users(self, one: int, call: Call) -> int:
        """Return how many functions outside a call use a tensor."""
        return sum(
            one in op.inputs and not call.begin <= number < call.end
            for number, op in enumerate(self.seen.ops[self.call.begin : self.call.end], self.call.begin)
        )

    def route(self, start: int) -> Route | None:
        """Return the shortest way back from a tensor to a projection, through norms too."""
        came: dict[int, tuple[int, Op | None]] = {}
        waiting = deque([start])
        while waiting:
            one = waiting.popleft()
            if one in self.projected:
                return self._route(one, start, came)
            norm = self.normed.get(one)
            op = None if norm is not None else self.op_of(one)
            sources = [norm.inputs[0][1]] if norm is not None else list(op.inputs) if op is not None else []
            for source in sources:
                if source not in came and source != start:
                    came[source] = (one, op)
                    waiting.append(source)
        return None

    def ways(self, end: int) -> tuple[set[int], set[int]]:
        """Return the outputs of the projections that a tensor comes from, through norms too, and what came of them."""
        starts: set[int] = set()
        passed: set[int] = set()
        waiting = [end]
        while waiting:
            one = waiting.pop()
            if one in passed or one in starts:
                continue
            if one in self.projected:
                starts.add(one)
                continue
            passed.add(one)
            norm = self.normed.get(one)
            op = None if norm is not None else self.op_of(one)
            waiting += [norm.inputs[0][1]] if norm is not None else op.inputs if op is not None else ()
            waiting += [i for copied in self._copied.get(self._memory(one), ()) for i in copied.inputs]
        return starts, {one for one in passed if starts & self.needs.get(one, set())}

    def _route(self, one: int, start: int, came: dict[int, tuple[int, Op | None]]) -> Route:
        call, ids, ops = self.projected[one], [one], []
        while one != start:
            one, op = came[one]
            ids.append(one)
            ops += [op] if op is not None else []
        return Route(call, tuple(ids), tuple(ops))

    def steps(self, start: int, end: int) -> list[Step] | None:
        """Return the additions to the residual stream between two tensors; None where it can't be followed."""
        found: list[Step] = []
        norm: Call | None = None
        one = end
        for _ in range(100):
            if one == start:
                return found[::-1]
            if one in self.normed:
                norm = self.normed[one]
                one = norm.inputs[0][1]
                continue
            op = self.op_of(one)
            if op is None:
                return None
            leaves = self._addends(one, op)
            if leaves is not None:
                stream = self._stream(leaves, start)
                if stream is None:
                    return None
                found.append(Step(stream, tuple(i for i in leaves if i != stream), one, norm))
                one, norm = stream, None
            elif op.name in PLAIN:
                one = op.inputs[0]
            else:
                return None
        return None

    def _addends(self, one: int, op: Op) -> list[int] | None:
        """Return what was added up to a tensor; None where it is no sum."""
        if op.name not in _SUMS or len(op.inputs) != 2:
            return None
        left, right = op.inputs
        if self.tensor(left).shape != self.tensor(one).shape or self.tensor(right).shape != self.tensor(one).shape:
            return None
        return [*self._leaves(left, right), *self._leaves(right, left)]

    def _leaves(self, one: int, other: int) -> Iterator[int]:
        """Yield the parts of a summand that are summands too: of two branches, but not of the stream before them."""
        op = self.op_of(one)
        inner = self._addends(one, op) if op is not None and self.emitted(one) is None else None
        if inner is None or one in self.needs.get(other, ()):
            yield one
        else:
            yield from inner

    def _stream(self, leaves: list[int], start: int) -> int | None:
        for one in leaves:
            if all(other == one or one in self.needs.get(other, ()) for other in leaves):
                return one
        return start if start in leaves else None


def is_projection(call: Call) -> bool:
    weight = getattr(call.module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and "Embedding" not in type(call.module).__name__
