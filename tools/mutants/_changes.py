"""Source text in, small changes out: each is one span of text and what stands there instead."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ._operators import Edit, defined, edits, is_text
from ._source import Text, flat

__all__ = ["Mutant", "functions_of", "mutants_of", "named_mutant"]


@dataclass(frozen=True)
class Mutant:
    """One change. What it is known by is its place and its text, not its line: others change the file too.

    Args:
        file: path from the root of the repository.
        function: qualified name of the function it lies in; "" where it is run when the module is imported.
        change: the statement before, and after it.
        kind: what was done.
        line: where the text changes, from 1.
        text: the whole file, changed.
        name: what is defined, where that happens at import.
        first, last: the lines of which a test runs one where the change is felt.
        tests: parts of the names of those that state the law.
        seen_by: the test that noticed it when it was judged last; "".
    """

    file: str
    function: str
    change: str
    kind: str
    line: int
    text: str
    name: str = ""
    first: int = 0
    last: int = 0
    tests: tuple[str, ...] = ()
    seen_by: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.function, self.change

    @property
    def compiles(self) -> bool:
        try:
            compile(self.text, self.file, "exec")
        except (SyntaxError, ValueError):
            return False
        return True

    @property
    def at_import(self) -> bool:
        return bool(self.name) or not self.function


def mutants_of(file: str, text: str) -> list[Mutant]:
    """Return every change that the operators know for one file, in the order of its lines."""
    tree, source = ast.parse(text), Text(text)
    found: list[Mutant] = []
    seen: dict[tuple[str, str], int] = {}
    for statement, function, name in _statements(tree.body, "", ""):
        for edit in edits(statement, source, in_function=bool(function) and not name):
            mutant = _mutant(file, function, name, statement, edit, source)
            count = seen[function, mutant.change] = seen.get((function, mutant.change), 0) + 1
            if count > 1:  # the same text twice in a function: told apart by its turn
                mutant = replace(mutant, change=f"{mutant.change} [{count}]")
            found.append(mutant)
    return found


def named_mutant(file: str, text: str, function: str, old: str, new: str) -> Mutant:
    """Return a change written down by hand: `old`, which stands once in the function, becomes `new`."""
    tree, source = ast.parse(text), Text(text)
    node = _find(tree, function.split(".")) if function else tree
    if node is None:
        raise LookupError(f"{file} has no function {function!r}.")
    start, end = source.span(node) if function else (0, len(source.bytes))
    body = source.bytes[start:end].decode()
    if body.count(old) != 1:
        raise LookupError(f"{old!r} stands {body.count(old)} times in {function or 'the module'} of {file}, not once.")
    at = start + len(body[: body.index(old)].encode())
    changed = source.with_(at, at + len(old.encode()), new)
    ast.parse(changed)
    line = source.bytes[:at].count(b"\n") + 1
    name = "" if function else old.split("=")[0].split(":")[0].strip()
    change = f"{flat(old)} => {flat(new) or 'nothing'}"
    return Mutant(file, function, change, "named", line, changed, name, line, line + old.count("\n"))


_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_BLOCKS = ("body", "orelse", "finalbody")


def functions_of(text: str) -> dict[str, str]:
    """Return the source of every function by its qualified name."""
    source, found = Text(text), {}
    todo: list[tuple[ast.AST, str]] = [(ast.parse(text), "")]
    while todo:
        node, scope = todo.pop()
        for child in ast.iter_child_nodes(node):
            inner = f"{scope}.{child.name}".lstrip(".") if isinstance(child, _SCOPES) else scope
            if isinstance(child, _SCOPES) and not isinstance(child, ast.ClassDef):
                found[inner] = source.of(child)
            todo.append((child, inner))
    return found


def _find(tree: ast.AST, names: list[str]) -> ast.AST | None:
    found: ast.AST | None = tree
    for name in names:
        inside = ast.walk(found) if found else ()
        found = next((n for n in inside if isinstance(n, _SCOPES) and n.name == name), None)
    return found


def _statements(body: list[ast.stmt], scope: str, function: str) -> Iterator[tuple[ast.stmt, str, str]]:
    """Yield statements with the function they lie in, and the name they define where that happens at import."""
    for statement in body:
        if isinstance(statement, (ast.Import, ast.ImportFrom, ast.Assert)) or is_text(statement):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        if isinstance(statement, _SCOPES):
            inner = f"{scope}.{statement.name}".lstrip(".")
            is_function = not isinstance(statement, ast.ClassDef)
            if is_function:
                yield statement, function or inner, "" if function else f"{statement.name}()"
            if statement.name != "__repr__":
                yield from _statements(statement.body, inner, function or (inner if is_function else ""))
            continue
        yield statement, function, "" if function else defined(statement)
        for block in _BLOCKS:
            yield from _statements(getattr(statement, block, []), scope, function)
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body, scope, function)


def _mutant(file: str, function: str, name: str, statement: ast.stmt, edit: Edit, source: Text) -> Mutant:
    start, end = source.span(statement)
    if getattr(statement, "body", None):
        first = statement.body[0]  # type: ignore[attr-defined]
        end = source.at(first.lineno, first.col_offset if first.lineno == statement.lineno else 0)
    # Of a long statement the lines that change will do.
    start = max(start, source.bytes.rfind(b"\n", 0, edit.start) + 1)
    end = min(end, source.bytes.find(b"\n", edit.end) % (len(source.bytes) + 1))
    old = source.bytes[start:end].decode()
    new = (source.bytes[start : edit.start] + edit.new.encode() + source.bytes[edit.end : end]).decode()
    # As many lines as before, so that the lines below keep their numbers.
    lost = source.bytes[edit.start : edit.end].count(b"\n") if edit.new == "pass" else 0
    text = source.with_(edit.start, edit.end, edit.new + "\n" * lost)
    line = source.bytes[: edit.start].count(b"\n") + 1
    first, last = statement.lineno, line
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):  # a default: felt wherever the body runs
        first, last = statement.body[0].lineno, statement.end_lineno or line
    return Mutant(file, function, f"{flat(old)} => {flat(new)}", edit.kind, line, text, name, first, last)
