"""The operators: one statement in, small changes of its text out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ._source import Text

__all__ = ["Edit", "defined", "edits", "is_text"]

COMPARED = {
    ast.Lt: ("<", "<=", ">="),
    ast.LtE: ("<=", "<", ">"),
    ast.Gt: (">", ">=", "<="),
    ast.GtE: (">=", ">", "<"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
REPLACED = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.BitOr: ("|", "&"),
    ast.BitAnd: ("&", "|"),
}
CALLED = {"sorted": "list", "reversed": "list", "min": "max", "max": "min", "any": "all", "all": "any"}
METHODS = {"maximum": "minimum", "minimum": "maximum", "amax": "amin", "amin": "amax"}


@dataclass(frozen=True)
class Edit:
    """A span of a source's bytes, and what is to stand there instead."""

    kind: str
    start: int
    end: int
    new: str


def edits(statement: ast.stmt, source: Text, *, in_function: bool) -> Iterator[Edit]:
    """Return the changes of one statement: of those that are run at import only what is surely no type."""
    if not in_function and defined(statement).startswith("__"):
        return
    if is_text(statement):
        return
    for node in _own_nodes(statement):
        yield from _of_node(node, source, in_function)
    if in_function:
        yield from _of_statement(statement, source)


def is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a text alone: a docstring."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def defined(statement: ast.stmt) -> str:
    """Return the name that an assignment defines."""
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    return targets[0].id if isinstance(targets[0], ast.Name) else "(module)"


def _own_nodes(statement: ast.stmt) -> Iterator[ast.AST]:
    """Walk what belongs to one statement itself: not the statements in it, no annotations, no text in f-strings.

    The positions of nodes within f-strings are not to be trusted before Python 3.12.
    """
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
        todo: list[ast.AST] = [d for d in (*statement.args.defaults, *statement.args.kw_defaults) if d is not None]
    elif isinstance(statement, ast.ClassDef):
        todo = []
    else:
        todo = [n for n in ast.iter_child_nodes(statement) if not isinstance(n, (ast.stmt, ast.ExceptHandler))]
        todo = [n for n in todo if n is not getattr(statement, "annotation", None)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.JoinedStr):
            continue
        yield node
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass", "cast"):
            children = [*(node.args[1:] if getattr(node.func, "id", "") == "cast" else node.args[:1])]
        todo.extend(children)


def _of_node(node: ast.AST, source: Text, in_function: bool) -> Iterator[Edit]:
    if isinstance(node, (ast.Compare, ast.BoolOp, ast.BinOp)):
        yield from _of_operator(node, source, in_function)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        if isinstance(node.op, ast.Not) or not isinstance(node.operand, ast.Constant):
            kind = "not" if isinstance(node.op, ast.Not) else "sign"
            yield Edit(kind, *source.span(node), f"({source.of(node.operand)})")
    elif isinstance(node, ast.IfExp):
        yield Edit("condition", *source.span(node.test), f"not ({source.of(node.test)})")
    elif isinstance(node, ast.Constant):
        yield from _of_constant(node, source)
    elif isinstance(node, ast.Slice):
        for bound in filter(None, (node.lower, node.upper)):
            yield Edit("slice", *source.span(bound), "")
    elif isinstance(node, ast.Call):
        yield from _of_call(node, source)


def _of_operator(node: ast.Compare | ast.BoolOp | ast.BinOp, source: Text, in_function: bool) -> Iterator[Edit]:
    if isinstance(node, ast.Compare):
        if len(node.ops) == 1:
            old, *others = COMPARED[type(node.ops[0])]
            for new in others:
                yield from _between(node.left, node.comparators[0], old, new, "comparison", source)
    elif isinstance(node, ast.BoolOp):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            yield from _between(left, right, old, new, "and/or", source)
    elif type(node.op) in REPLACED and not _is_words(node):
        old, new = REPLACED[type(node.op)]
        if in_function or old != "|":  # at import `a | b` is mostly a type
            yield from _between(node.left, node.right, old, new, "arithmetic", source)


def _between(left: ast.AST, right: ast.AST, old: str, new: str, kind: str, source: Text) -> Iterator[Edit]:
    start, end = source.span(left)[1], source.span(right)[0]
    gap = source.bytes[start:end].decode()
    pattern = r"\s+".join(map(re.escape, old.split()))
    changed, count = re.subn(pattern, new, gap, count=1)
    if count:
        yield Edit(kind, start, end, changed)


def _is_words(node: ast.BinOp) -> bool:
    return any(
        isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in (node.left, node.right)
    )


def _of_constant(node: ast.Constant, source: Text) -> Iterator[Edit]:
    if isinstance(node.value, bool):
        yield Edit("constant", *source.span(node), str(not node.value))
    elif isinstance(node.value, int):
        for new in (node.value + 1, node.value - 1):
            yield Edit("constant", *source.span(node), str(new) if new >= 0 else f"({new})")
    elif isinstance(node.value, float):
        new_value = node.value * 2 if node.value else 1.0
        if new_value != node.value:
            yield Edit("constant", *source.span(node), repr(new_value))


def _of_call(node: ast.Call, source: Text) -> Iterator[Edit]:
    name = getattr(node.func, "id", "")
    if name in CALLED and len(node.args) == 1:
        if name in ("sorted", "reversed"):
            yield Edit("order", *source.span(node), f"list({source.of(node.args[0])})")
        else:
            yield Edit("min/max, any/all", *source.span(node.func), CALLED[name])
    elif name in ("min", "max") and len(node.args) > 1:
        yield Edit("min/max, any/all", *source.span(node.func), CALLED[name])
    elif isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
        end = source.span(node.func)[1]
        yield Edit("min/max, any/all", end - len(node.func.attr), end, METHODS[node.func.attr])


def _of_statement(statement: ast.stmt, source: Text) -> Iterator[Edit]:
    span = source.span(statement)
    if isinstance(statement, (ast.If, ast.While)) and not isinstance(statement.test, (ast.Compare, ast.UnaryOp)):
        yield Edit("condition", *source.span(statement.test), f"not ({source.of(statement.test)})")
    elif isinstance(statement, ast.Return):
        if statement.value is None:
            yield Edit("deleted", *span, "pass")
        elif not (isinstance(statement.value, ast.Constant) and statement.value.value is None):
            yield Edit("return", *source.span(statement.value), "None")
    elif isinstance(statement, (ast.Break, ast.Continue)):
        yield Edit("loop", *span, "continue" if isinstance(statement, ast.Break) else "break")
        yield Edit("deleted", *span, "pass")
    elif isinstance(statement, ast.AugAssign) and type(statement.op) in REPLACED:
        old, new = REPLACED[type(statement.op)]
        if isinstance(statement.op, (ast.Add, ast.Sub, ast.Mult, ast.BitOr, ast.BitAnd)):
            yield from _between(statement.target, statement.value, f"{old}=", f"{new}=", "arithmetic", source)
        yield Edit("deleted", *span, "pass")
    elif isinstance(statement, (ast.Expr, ast.Delete, ast.Raise)) or (
        isinstance(statement, ast.Assign)
        and all(isinstance(t, (ast.Attribute, ast.Subscript)) for t in statement.targets)
    ):
        yield Edit("deleted", *span, "pass")
