"""Nodes -> values, with numpy over all paths at once. What was not measured is not known, nor is what needs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ...records import Bools, StepRecord
from ._nodes import Arithmetic, Call, Claims, Column, Comparison, Negation, Node, Number, Over, Scalar
from ._past import Memory, past, remember

__all__ = ["Evaluation", "Value"]

_OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.true_divide,
    "**": np.power,
    ">": np.greater,
    ">=": np.greater_equal,
    "<": np.less,
    "<=": np.less_equal,
    "==": np.equal,
    "!=": np.not_equal,
}
_ELEMENTWISE: Mapping[str, Callable[[Any], Any]] = {"abs": np.abs, "log": np.log, "sqrt": np.sqrt}
_REDUCTIONS: Mapping[str, Callable[[Any], Any]] = {
    "max_over": np.max,
    "min_over": np.min,
    "mean_over": np.mean,
    "median_over": np.median,
}


class Value(NamedTuple):
    """An array over paths or one number, and where it is known."""

    values: Any
    known: Any


class Evaluation:
    """Evaluates one expression on one record. `memory` is read, `fresh` is what it is afterwards.

    Args:
        record: of the step.
        chosen: paths that columns are read at (n,).
        memory: by slot of the functions of the past.
    """

    def __init__(self, record: StepRecord, chosen: Bools, memory: Mapping[int, Memory]) -> None:
        self.record = record
        self.chosen = chosen
        self.memory = memory
        self.fresh: dict[int, Memory] = {}
        self._known: dict[int, Value] = {}

    def value(self, node: Node) -> Value:
        """Return the value of a node."""
        with np.errstate(all="ignore"):
            return self._value(node)

    def _value(self, node: Node) -> Value:
        # By identity: two equal functions of the past have a memory each.
        if id(node) not in self._known:
            self._known[id(node)] = self._compute(node)
        return self._known[id(node)]

    def _compute(self, node: Node) -> Value:
        if isinstance(node, Number):
            return Value(node.value, True)
        if isinstance(node, Column):
            column = self.record.columns.get(node.name)
            if column is None:
                return Value(math.nan, False)
            return Value(column, self.record.measured(node.name) & self.chosen)
        if isinstance(node, Scalar):
            return self._scalar(node.name)
        if isinstance(node, Arithmetic):
            left = self._value(node.left)
            if node.right is None:
                return Value(np.negative(left.values), left.known)
            right = self._value(node.right)
            return Value(_OPERATORS[node.operator](np.float64(left.values), right.values), _both(left, right))
        if isinstance(node, Comparison):
            left, right = self._value(node.left), self._value(node.right)
            return Value(_OPERATORS[node.operator](left.values, right.values), _both(left, right))
        return self._claim_or_call(node)

    def _claim_or_call(self, node: Node) -> Value:
        if isinstance(node, Claims):
            return self._claims(node)
        if isinstance(node, Negation):
            part = self._value(node.part)
            return Value(np.logical_not(part.values), part.known)
        if isinstance(node, Over):
            matches = self.record.index.select(node.patterns)
            if node.part is None:
                return Value(matches & self.chosen, True)
            part = self._value(node.part)
            return Value(part.values, np.logical_and(part.known, matches))
        assert isinstance(node, Call)
        part = self._value(node.part)
        if node.slot >= 0:
            return self._trailing(node, part)
        if node.name in _ELEMENTWISE:
            return Value(_ELEMENTWISE[node.name](part.values), part.known)
        return _over_paths(node.name, part)

    def _scalar(self, name: str) -> Value:
        record = self.record
        if name == "loss":
            return Value(record.loss, record.has_loss)
        if name in ("global_norm", "global_norm_after"):
            return Value(float(getattr(record, name)), record.has_gradient)
        if name in ("step", "epoch", "num_samples", "lr"):
            return Value(float(getattr(record, name)), True)
        return Value(record.scalars.get(name, math.nan), name in record.scalars)

    def _claims(self, node: Claims) -> Value:
        # What is false whatever the unknown part may be, is known: "step > 100 and ..." is false at step 1.
        decides = node.operator == "or"
        combine = np.logical_or if decides else np.logical_and
        values: Any = not decides
        known: Any = True
        settled: Any = False
        for part in node.parts:
            value = self._value(part)
            here = np.logical_and(value.known, np.equal(value.values, decides))
            settled = np.logical_or(settled, here)
            known = np.logical_and(known, value.known)
            values = combine(values, np.where(value.known, value.values, not decides))
        return Value(values, np.logical_or(known, settled))

    def _trailing(self, node: Call, part: Value) -> Value:
        memory = self.memory.get(node.slot, {})
        self.fresh[node.slot] = remember(node, memory, self.record.step, part.values, part.known)
        value = Value(*past(node, memory, self.record.step, part.values))
        return Value(value.values, np.logical_and(value.known, part.known)) if node.name == "rate" else value


def _both(left: Value, right: Value) -> Any:
    return np.logical_and(left.known, right.known)


def _over_paths(name: str, part: Value) -> Value:
    if not isinstance(part.known, np.ndarray):
        # A claim such as over("a.*") is known everywhere; a column that is absent nowhere.
        if not part.known:
            return Value(False if name in ("any_over", "all_over") else math.nan, False)
        chosen = np.asarray(part.values)
    else:
        chosen = np.broadcast_to(np.asarray(part.values), part.known.shape)[part.known]
    if not chosen.size:
        return Value(False if name in ("any_over", "all_over") else math.nan, False)
    if name == "any_over":
        return Value(bool(chosen.any()), True)
    if name == "all_over":
        return Value(bool(chosen.all()), True)
    if name == "share_over":
        return Value(float(chosen.mean()), True)
    if name == "norm_over":
        largest = float(np.abs(chosen).max())
        scaled = largest if not 0 < largest < math.inf else largest * float(np.sqrt(np.square(chosen / largest).sum()))
        return Value(scaled, True)
    return Value(float(_REDUCTIONS[name](chosen)), True)
