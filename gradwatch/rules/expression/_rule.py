"""A rule written as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import Any

import numpy as np

from ...records import StepRecord
from .._findings import Findings
from .._rule import Rule, State
from .._selection import first_in_order, select
from ._evaluate import Evaluation, Value
from ._nodes import Column, Comparison, Node, Scalar
from ._parse import parse

__all__ = ["Expression"]


class Expression(Rule):
    """Fires where an expression holds: `Expression("grad_norm > 5 * median(grad_norm, 200)", paths="*.attn.*")`.

    Columns give one claim per path, all else one for the whole model. What was not measured at a step is not judged.
    The language is in docs/rules.md.

    Args:
        expression: a comparison, or several joined by and, or, not.
    """

    expression: str = field(kw_only=False)
    advice: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse(self.expression)

    @property
    def wants(self) -> frozenset[str]:
        """Columns and scalars that the expression reads."""
        return frozenset(n.name for n in _walk(parse(self.expression)) if isinstance(n, (Column, Scalar)))

    def init(self) -> State:
        return {"past": {}, "per_path": {}}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        tree = parse(self.expression)
        chosen = select(record.index, self.paths, "any")
        memory = {int(k): {**state["past"].get(k, {}), **_rows(state, k)} for k in _keys(state)}
        evaluation = Evaluation(record, chosen, memory)
        value = evaluation.value(tree)
        state = _state(state, evaluation.fresh)
        shown = _shown(tree)
        left, right = evaluation.value(shown.left), evaluation.value(shown.right)
        if not np.any(value.known):
            return self.unjudged(record, "what it reads was not measured"), state
        text = "{value:.4g} " + shown.operator + " {limit:.4g}"
        if not tree.per_path:
            return self.whole(record, bool(value.values), _one(left), _one(right), text), state
        n = len(record.index)
        known = np.broadcast_to(value.known, n) & chosen
        values, limits = (np.array(np.broadcast_to(v.values, n), np.float64) for v in (left, right))
        return self.over(record, np.asarray(value.values) & known, known, values, limits, text), state

    def first_path(self, record: StepRecord, positions: Any) -> str:
        backward = any(name.startswith("grad") for name in self.wants)
        return first_in_order(record.index, positions, "backward" if backward else "forward")


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for value in vars(node).values():
        for child in value if isinstance(value, tuple) else (value,):
            if isinstance(child, Node):
                yield from _walk(child)


def _shown(tree: Node) -> Comparison:
    """Return the comparison whose two sides are reported: the first per path, else the first."""
    found = [n for n in _walk(tree) if isinstance(n, Comparison)]
    return next((n for n in found if n.per_path), found[0])


def _one(value: Value) -> float:
    known = np.broadcast_to(value.known, np.shape(value.values))
    numbers = np.asarray(value.values, np.float64)[known]
    return float(numbers.max()) if numbers.size else float("nan")


def _keys(state: State) -> set[str]:
    return set(state["past"]) | {name.split("/")[0] for name in state["per_path"]}


def _rows(state: State, key: str) -> dict[str, Any]:
    return {name.split("/")[1]: v for name, v in state["per_path"].items() if name.split("/")[0] == key}


def _state(state: State, fresh: dict[int, Any]) -> State:
    """Return the memory with arrays over paths under "per_path", so that they follow a change of the index."""
    past, per_path = dict(state["past"]), dict(state["per_path"])
    for slot, memory in fresh.items():
        plain = {}
        for name, value in memory.items():
            arrays = isinstance(value, np.ndarray) or (name == "rows" and value and isinstance(value[0], np.ndarray))
            if arrays:
                per_path[f"{slot}/{name}"] = value
            else:
                plain[name] = value
        past[str(slot)] = plain
    return {"past": past, "per_path": per_path}
