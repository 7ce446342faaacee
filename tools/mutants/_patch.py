"""Puts a changed source into effect within a running process, by giving its functions their new code."""

from __future__ import annotations

import ast
import gc
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from types import CodeType, FunctionType

__all__ = ["Live", "UnpatchableError", "rebind"]


class UnpatchableError(Exception):
    """A change that a running process can't take over: it needs a new one."""


class Live:
    """The functions of some source files that live in this process, by file and code."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._functions: dict[str, list[FunctionType]] = defaultdict(list)
        for thing in gc.get_objects():
            if type(thing) is FunctionType and thing.__code__.co_filename.startswith(root):
                self._functions[thing.__code__.co_filename].append(thing)

    def patch(self, path: str, old: str, new: str, function: str) -> None:
        """Give the functions of one file the code of its changed text.

        A file that nobody has imported yet has none: it is read when it is imported.

        Raises:
            UnpatchableError: where a function can't take its new code.
        """
        module = next((m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == path), None)
        if module is None:
            return
        for kept in vars(module).values():
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()  # what the whole code came to
        functions = self._functions.get(path, [])
        before, after = _codes(old, path), _codes(new, path)
        # Known by their place: pytest may have rewritten their assertions.
        places = Counter(map(_place, before.values()))
        news = {_place(code): after[key] for key, code in before.items() if key in after and after[key] != code}
        count = 0
        for each in functions:
            place = _place(each.__code__)
            code = news.get(place)
            if code is None:
                continue
            if places[place] > 1:
                raise UnpatchableError(f"{places[place]} functions {place[0]} begin in line {place[1]} of {path}")
            try:
                each.__code__ = code
            except ValueError as error:
                raise UnpatchableError(str(error)) from error
            count += 1
        if not count:
            raise UnpatchableError(f"no living function {function} in {path}")

    def rebind_defaults(self, path: str, old: Mapping[str, str], new: Mapping[str, str], function: str) -> None:
        """Give the living functions of one name the default that changed."""
        functions = [f for f in self._functions.get(path, ()) if f.__qualname__ == function]
        changed = [name for name in old if old[name] != new.get(name)]
        if len(changed) != 1 or not functions:
            raise UnpatchableError(f"not one default of {function} in {path}")
        (name,) = changed
        for each in functions:
            value = eval(new[name], dict(each.__globals__))
            if name in (each.__kwdefaults__ or {}):
                each.__kwdefaults__ = {**(each.__kwdefaults__ or {}), name: value}
                continue
            code, defaults = each.__code__, list(each.__defaults__ or ())
            defaults[code.co_varnames.index(name) - code.co_argcount] = value
            each.__defaults__ = tuple(defaults)


def rebind(path: str, old: str, new: str, function: str, live: Live) -> None:
    """Put into effect what is bound at import: a constant of the module, or the default of an argument.

    Raises:
        UnpatchableError: where more than that changed.
    """
    if function:
        live.rebind_defaults(path, _defaults(old, function), _defaults(new, function), function)
        return
    before, after = _constants(old), _constants(new)
    changed = {name for name in before if before[name] != after.get(name)}
    module = next((m for m in sys.modules.values() if getattr(m, "__file__", None) == path), None)
    if len(changed) != 1 or module is None or (name := changed.pop()) not in vars(module):
        raise UnpatchableError(f"not one constant of {path}")
    was, now = vars(module)[name], eval(after[name], dict(vars(module)))
    for each in [m for m in sys.modules.values() if str(getattr(m, "__file__", "")).startswith(live.root)]:
        if vars(each).get(name) is was:
            setattr(each, name, now)


def _constants(text: str) -> dict[str, str]:
    found = {}
    for statement in ast.parse(text).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if isinstance(targets[0], ast.Name) and isinstance(value, ast.expr):
            found[targets[0].id] = ast.unparse(value)
    return found


def _defaults(text: str, function: str) -> dict[str, str]:
    """Return the defaults of a function's arguments, by name."""
    node: ast.AST = ast.parse(text)
    for name in function.split("."):
        node = next(n for n in ast.walk(node) if getattr(n, "name", None) == name)
    arguments = node.args  # type: ignore[attr-defined]
    positional = [*arguments.posonlyargs, *arguments.args]
    pairs = [*zip(positional[len(positional) - len(arguments.defaults) :], arguments.defaults, strict=True)]
    pairs += [(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None]
    return {argument.arg: ast.unparse(default) for argument, default in pairs}


def _place(code: CodeType) -> tuple[str, int]:
    return code.co_name, code.co_firstlineno


def _codes(text: str, path: str) -> dict[tuple[str, int], CodeType]:
    """Return the code of every function in a source, by its qualified name and its turn among those of that name."""
    found: dict[tuple[str, int], CodeType] = {}
    turns: dict[str, int] = defaultdict(int)
    todo = [("", compile(text, path, "exec", dont_inherit=True))]
    while todo:
        scope, code = todo.pop(0)
        name = f"{scope}.{code.co_name}"
        found[name, turns[name]] = code
        turns[name] += 1
        todo[:0] = [(name, c) for c in code.co_consts if isinstance(c, CodeType)]
    return found
