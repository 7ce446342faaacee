"""The parts an expression can have. A node gives numbers or claims, per path or one for the step."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Arithmetic", "Call", "Claims", "Column", "Comparison", "Negation", "Node", "Number", "Over", "Scalar"]


@dataclass(frozen=True)
class Node:
    """Base of all nodes.

    Attributes:
        per_path: it has a value per path.
        is_claim: its values are true or false.
    """

    per_path: bool = field(default=False, kw_only=True)
    is_claim: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Number(Node):
    value: float


@dataclass(frozen=True)
class Column(Node):
    name: str


@dataclass(frozen=True)
class Scalar(Node):
    name: str


@dataclass(frozen=True)
class Arithmetic(Node):
    """`+ - * / **` of two, or the sign of one (`right` is None)."""

    operator: str
    left: Node
    right: Node | None = None


@dataclass(frozen=True)
class Comparison(Node):
    operator: str
    left: Node
    right: Node


@dataclass(frozen=True)
class Claims(Node):
    """`and` / `or` of several."""

    operator: str
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Negation(Node):
    part: Node


@dataclass(frozen=True)
class Over(Node):
    """`over("glob")`: whether a path matches; `over(x, "glob")`: x at the paths that match."""

    patterns: tuple[str, ...]
    part: Node | None = None


@dataclass(frozen=True)
class Call(Node):
    """A function of the past (`steps`, and `share` for quantiles), over paths, or of each value.

    `slot` numbers the functions of the past, whose memory is kept under it.
    """

    name: str
    part: Node
    steps: int = 0
    share: float = 0.0
    slot: int = -1
