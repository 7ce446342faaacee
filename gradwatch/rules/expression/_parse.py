"""Text -> nodes. Python's grammar, of which all but a few forms are refused."""

from __future__ import annotations

import ast
import warnings
from functools import lru_cache

from ...errors import ConfigError, suggest
from ._nodes import Arithmetic, Call, Claims, Column, Comparison, Negation, Node, Number, Over, Scalar
from ._vocabulary import ELEMENTWISE, FUNCTIONS, REDUCTIONS, TRAILING, is_column, is_scalar, known_names

__all__ = ["MAX_WINDOW", "parse"]

MAX_LENGTH = 2000
MAX_NODES = 300
MAX_DEPTH = 40
MAX_TRAILING = 16
MAX_WINDOW = 10_000

_ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**"}
_COMPARISONS = {ast.Gt: ">", ast.GtE: ">=", ast.Lt: "<", ast.LtE: "<=", ast.Eq: "==", ast.NotEq: "!="}


@lru_cache(maxsize=256)
def parse(text: str) -> Node:
    """Return the expression as nodes.

    Raises:
        ConfigError: with the place in the text, counted from 1, and the nearest names.
    """
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"an expression is a text such as 'grad_norm > 1'. Got {text!r}.")
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"an expression has at most {MAX_LENGTH} characters. This one has {len(text)}.")
    # Lines of a folded YAML text are one line here, so that columns count through.
    text = " ".join(text.replace("\t", " ").splitlines())
    shift = len(text) - len(text.lstrip())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text.lstrip(), mode="eval")
    except SyntaxError as error:
        raise _error(text, (error.offset or 1) - 1 + shift, f"this can't be read ({error.msg})") from error
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise ConfigError(f"the expression can't be read: {type(error).__name__}.") from error
    if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
        raise ConfigError(f"an expression has at most {MAX_NODES} parts: {text[:80]!r}...")
    node = _Parser(text, shift).read(tree.body, 0)
    if not node.is_claim:
        raise _error(text, shift, "an expression is a comparison, such as `grad_norm > 1`; this gives a number")
    return node


def _error(text: str, column: int, what: str) -> ConfigError:
    shown = text if len(text) <= 120 else text[:117] + "..."
    return ConfigError(f"expression {shown!r}, column {column + 1}: {what}.")


class _Parser:
    def __init__(self, text: str, shift: int) -> None:
        self.text, self.shift = text, shift
        self.slots = 0

    def error(self, node: ast.AST, what: str) -> ConfigError:
        # Offsets of the grammar count bytes.
        offset = getattr(node, "col_offset", 0)
        before = self.text.lstrip().encode(errors="replace")[:offset].decode(errors="replace")
        return _error(self.text, len(before) + self.shift, what)

    def read(self, node: ast.expr, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self.error(node, f"parts are nested more than {MAX_DEPTH} deep")
        depth += 1
        if isinstance(node, ast.Constant):
            return self.number(node)
        if isinstance(node, ast.Name):
            return self.name(node)
        if isinstance(node, ast.BinOp):
            return self.arithmetic(node, depth)
        if isinstance(node, ast.UnaryOp):
            return self.unary(node, depth)
        if isinstance(node, ast.Compare):
            return self.comparison(node, depth)
        if isinstance(node, ast.BoolOp):
            parts = tuple(self.claim(part, depth) for part in node.values)
            operator = "and" if isinstance(node.op, ast.And) else "or"
            return Claims(operator, parts, per_path=any(p.per_path for p in parts), is_claim=True)
        if isinstance(node, ast.Call):
            return self.call(node, depth)
        raise self.error(node, f"{type(node).__name__} is not part of the language")

    def number(self, node: ast.Constant) -> Node:
        if isinstance(node.value, bool) or not isinstance(node.value, (int, float)):
            raise self.error(node, f"{str(node.value)[:40]!r} is not a number")
        try:
            return Number(float(node.value))
        except OverflowError as error:
            raise self.error(node, "this number is too large") from error

    def name(self, node: ast.Name) -> Node:
        if is_column(node.id):
            return Column(node.id, per_path=True)
        if is_scalar(node.id):
            return Scalar(node.id)
        hint = suggest(node.id[:60], known_names())
        raise self.error(node, f"there is no column or scalar {node.id[:60]!r}. {hint}".rstrip(". "))

    def value(self, node: ast.expr, depth: int) -> Node:
        found = self.read(node, depth)
        if found.is_claim:
            raise self.error(node, "a number is needed here, this is true or false")
        return found

    def claim(self, node: ast.expr, depth: int) -> Node:
        found = self.read(node, depth)
        if not found.is_claim:
            raise self.error(node, "a comparison is needed here, this is a number")
        return found

    def arithmetic(self, node: ast.BinOp, depth: int) -> Node:
        operator = _ARITHMETIC.get(type(node.op))
        if operator is None:
            raise self.error(
                node, f"there is no operator {type(node.op).__name__}; known are {' '.join(_ARITHMETIC.values())}"
            )
        left, right = self.value(node.left, depth), self.value(node.right, depth)
        return Arithmetic(operator, left, right, per_path=left.per_path or right.per_path)

    def unary(self, node: ast.UnaryOp, depth: int) -> Node:
        if isinstance(node.op, ast.Not):
            part = self.claim(node.operand, depth)
            return Negation(part, per_path=part.per_path, is_claim=True)
        if not isinstance(node.op, (ast.USub, ast.UAdd)):
            raise self.error(node, f"there is no operator {type(node.op).__name__}")
        part = self.value(node.operand, depth)
        return part if isinstance(node.op, ast.UAdd) else Arithmetic("-", part, per_path=part.per_path)

    def comparison(self, node: ast.Compare, depth: int) -> Node:
        operands = [self.value(part, depth) for part in (node.left, *node.comparators)]
        found = []
        for op, left, right in zip(node.ops, operands, operands[1:], strict=False):
            operator = _COMPARISONS.get(type(op))
            if operator is None:
                raise self.error(node, f"there is no comparison {type(op).__name__}")
            found.append(Comparison(operator, left, right, per_path=left.per_path or right.per_path, is_claim=True))
        if len(found) == 1:
            return found[0]
        return Claims("and", tuple(found), per_path=any(c.per_path for c in found), is_claim=True)

    def call(self, node: ast.Call, depth: int) -> Node:
        if not isinstance(node.func, ast.Name):
            raise self.error(node, "only functions of the language can be called")
        name = node.func.id
        if name not in FUNCTIONS:
            raise self.error(node, f"there is no function {name[:60]!r}. {suggest(name[:60], FUNCTIONS)}".rstrip(". "))
        if node.keywords or any(isinstance(a, ast.Starred) for a in node.args):
            raise self.error(node, f"{name} takes its arguments by place")
        if name == "over":
            return self.over(node, depth)
        if name in TRAILING:
            return self.trailing(name, node, depth)
        if len(node.args) != 1:
            raise self.error(node, f"{name} takes one argument")
        if name in ELEMENTWISE:
            part = self.value(node.args[0], depth)
            return Call(name, part, per_path=part.per_path)
        claims = name in ("share_over", "any_over", "all_over")
        part = self.claim(node.args[0], depth) if claims else self.value(node.args[0], depth)
        if not part.per_path:
            raise self.error(node, f"{name} goes over paths, and this has one value for all of them")
        return Call(name, part, is_claim=name in ("any_over", "all_over"))

    def over(self, node: ast.Call, depth: int) -> Node:
        args = list(node.args)
        part = None if not args or _is_text(args[0]) else self.read(args.pop(0), depth)
        patterns = tuple(a.value for a in args if isinstance(a, ast.Constant) and isinstance(a.value, str) and a.value)
        if not patterns or len(patterns) != len(args):
            raise self.error(node, 'over takes patterns, `over("encoder.*")`, or a value and patterns')
        if part is not None and not part.per_path:
            raise self.error(node, "over chooses among paths, and this has one value for all of them")
        return Over(patterns, part, per_path=True, is_claim=part is None or part.is_claim)

    def trailing(self, name: str, node: ast.Call, depth: int) -> Node:
        if len(node.args) != (3 if name == "quantile" else 2):
            form = "quantile(x, q, n)" if name == "quantile" else f"{name}(x, n)"
            raise self.error(node, f"{name} is written {form}")
        part = self.value(node.args[0], depth)
        numbers = [self.value(a, depth) for a in node.args[1:]]
        values = [n.value for n in numbers if isinstance(n, Number)]
        if len(values) != len(numbers):
            raise self.error(node, f"the number of measurements of {name} is a plain number")
        share = 0.0
        if name == "quantile":
            share, count = values if 0 <= values[0] <= 1 else values[::-1]
            if not 0 <= share <= 1:
                raise self.error(node, "a quantile lies between 0 and 1")
        else:
            count = values[0]
        least = 1 if name in ("lag", "rate") else 2
        if not (least <= count <= MAX_WINDOW and count == int(count)):
            raise self.error(
                node, f"the number of measurements of {name} is a whole number from {least} to {MAX_WINDOW}"
            )
        self.slots += 1
        if self.slots > MAX_TRAILING:
            raise self.error(node, f"an expression has at most {MAX_TRAILING} functions of the past")
        return Call(name, part, int(count), share, self.slots - 1, per_path=part.per_path)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


assert set(REDUCTIONS) <= set(FUNCTIONS)
