"""Where a graph uses a parameter: the operation, and the changes of shape between the two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ._rows import batch_axes

__all__ = ["Use", "are_coupled", "find_uses", "shape_of_node"]

Change = Callable[[Tensor], Tensor]
_Step = tuple[Change, tuple[Any, ...], bool]
"""A change of shape, the part of the parameter that it takes, and whether it transposes."""

_SAME = ("ToCopyBackward0", "CloneBackward0", "AliasBackward0", "ToDtypeBackward0")
_RESHAPES = (
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "UnsqueezeBackward0",
    "ViewAsBackward0",
)


@dataclass
class Use:
    """One use of a parameter by an operation.

    Attributes:
        node: the operation.
        argument: which of its inputs the parameter is.
        path: the changes between the parameter and that input, nearest the parameter first.
        key: which part of the parameter it is; uses of different parts don't meet. () is all of it.
        is_transposed: it is used as its transpose.
        consumers: nodes that take what the operation makes.
    """

    node: Any
    argument: int
    param: Tensor
    path: tuple[Change, ...] = ()
    key: tuple[Any, ...] = ()
    is_transposed: bool = False
    consumers: Sequence[Any] = ()

    def carry(self, gradient: Tensor) -> Tensor:
        """Return what the changes make of a gradient of the parameter."""
        for change in self.path:
            gradient = change(gradient)
        return gradient


@dataclass
class _Way:
    """How a node's output comes of a parameter by changes of shape alone."""

    param: Tensor
    path: tuple[Change, ...] = ()
    key: tuple[Any, ...] = ()
    is_transposed: bool = False


@dataclass
class _Search:
    params: Mapping[int, Tensor]
    size: int
    consumers: Mapping[Any, Sequence[Any]]
    ways: dict[tuple[Any, int], _Way | None] = field(default_factory=dict)

    def way(self, node: Any, output: int) -> _Way | None:
        if (node, output) not in self.ways:
            self.ways[node, output] = self._way(node, output)
        return self.ways[node, output]

    def _way(self, node: Any, output: int) -> _Way | None:
        name = node.name()
        if name.endswith("AccumulateGrad"):
            variable = node.variable
            return _Way(variable) if id(variable) in self.params else None
        step = self._looked_up(node) if name == "EmbeddingBackward0" else _step(node, output)
        if step is None or not node.next_functions or node.next_functions[0][0] is None:
            return None
        change, key, turns = step
        behind = self.way(*node.next_functions[0])
        if behind is None:
            return None
        keys = behind.key + key
        return _Way(behind.param, (*behind.path, change), keys, behind.is_transposed != turns)

    def _looked_up(self, node: Any) -> _Step | None:
        """A table of places, looked up once for all samples: each row at most once."""
        indices = node._saved_indices
        dims = len(shape_of_node(node))
        is_repeated = any(len(shape_of_node(c)) > dims for c in self.consumers.get(node, ()))
        if indices.unique().numel() != indices.numel():
            return None
        if batch_axes((*indices.shape, 1), self.size) and not is_repeated:
            return None
        return (lambda g: g[indices]), (("rows", tuple(indices.reshape(-1).tolist())),), False


def find_uses(roots: Sequence[Any], params: Sequence[Tensor], size: int) -> list[Use]:
    """Return every use of some parameters in the graph behind some nodes, in no order.

    Args:
        roots: nodes that made what backward begins with.
        params: leaves.
        size: samples in the batch.
    """
    nodes = list(_nodes(roots))
    consumers: dict[Any, list[Any]] = {}
    for node in nodes:
        for following, _ in node.next_functions:
            if following is not None:
                consumers.setdefault(following, []).append(node)
    search = _Search({id(p): p for p in params}, size, consumers)
    found = []
    for node in nodes:
        for argument, (following, output) in enumerate(node.next_functions):
            if following is None:
                continue
            way = search.way(following, output)
            # A change of shape is passed through: what takes its output is the use.
            if way is not None and search.way(node, 0) is None:
                around = consumers.get(node, ())
                found.append(Use(node, argument, way.param, way.path, way.key, way.is_transposed, around))
    return found


def are_coupled(roots: Sequence[Any]) -> bool:
    """Return whether samples act on each other by a batch normalisation: what a sample adds to a gradient at a layer
    before it comes of other samples' losses, too."""
    return any("BatchNorm" in node.name() and getattr(node, "_saved_training", True) for node in _nodes(roots))


def shape_of_node(node: Any, output: int = 0) -> tuple[int, ...]:
    """Return the shape of what a node has made."""
    return tuple(int(n) for n in node._input_metadata[output].shape)


def _nodes(roots: Sequence[Any]) -> Iterator[Any]:
    todo, seen = [root for root in roots if root is not None], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        todo.extend(following for following, _ in node.next_functions if following is not None)


def _signed(value: int) -> int:
    # The graph keeps numbers without a sign.
    return value - 2**64 if value >= 2**63 else value


def _step(node: Any, output: int) -> _Step | None:
    """Return what a node does to a parameter, where it only changes its shape; None of all other nodes."""
    name = node.name()
    if name in _SAME:
        return _same, (), False
    if name in _RESHAPES:
        shape = shape_of_node(node, output)
        return (lambda g: g.reshape(shape)), (), False
    if name == "TBackward0":
        return (lambda g: g.t()), (), True
    maker = _STEPS.get(name)
    return None if maker is None else maker(node, output)


def _same(gradient: Tensor) -> Tensor:
    return gradient


def _transpose(node: Any, output: int) -> _Step:
    dims = _signed(node._saved_dim0), _signed(node._saved_dim1)
    return (lambda g: g.transpose(*dims)), (), dims[0] != dims[1]


def _permute(node: Any, output: int) -> _Step:
    dims = [_signed(d) for d in node._saved_dims]
    return (lambda g: g.permute(dims)), (), dims == [1, 0]


def _slice(node: Any, output: int) -> _Step:
    dim, start, step = _signed(node._saved_dim), _signed(node._saved_start or 0), node._saved_step
    length = shape_of_node(node)[dim]
    part = slice(start, start + (length - 1) * step + 1, step) if start >= 0 else slice(start, None, step)
    full = int(node._saved_self_sym_sizes[dim])
    key = () if length == full else (("slice", dim, start, length, step),)
    return (lambda g: g.movedim(dim, 0)[part].movedim(0, dim)), key, False


def _select(node: Any, output: int) -> _Step:
    dim, index = _signed(node._saved_dim), _signed(node._saved_index)
    return (lambda g: g.select(dim, index)), (("select", dim, index),), False


def _split(node: Any, output: int) -> _Step:
    dim, length = _signed(node._saved_dim), int(node._saved_split_size)
    return (lambda g: g.split(length, dim)[output]), (("split", dim, length, output),), False


def _unbind(node: Any, output: int) -> _Step:
    dim = _signed(node._saved_dim)
    return (lambda g: g.unbind(dim)[output]), (("select", dim, output),), False


_STEPS: Mapping[str, Callable[[Any, int], _Step]] = {
    "TransposeBackward0": _transpose,
    "PermuteBackward0": _permute,
    "SliceBackward0": _slice,
    "SelectBackward0": _select,
    "SplitBackward0": _split,
    "UnsafeSplitBackward0": _split,
    "UnbindBackward0": _unbind,
}
