"""The one walker over what users pass around: trees of tensors in containers, dataclasses and objects of their own.

It reads storage and runs no code of the object's class: no property, no `__getattr__`, `__iter__`, `__len__` or `keys`
of its own. So nothing raises on access, nothing lazy is computed (or drawn at random) earlier than the training would,
and generators, iterators, files and loaders are never consumed. What an object would only compute has no leaf.
"""

from __future__ import annotations

import copy
import types
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

__all__ = ["MAX_DEPTH", "children", "find", "map_tensors", "pick", "storage", "tensors_of", "walk"]

MAX_DEPTH = 100
"""Levels that are looked into; what nests deeper, or holds itself, ends there."""
MAX_VISITS = 100_000
"""Things looked at in one tree, numbers and strings aside."""

_SCALARS = frozenset({int, float, bool, complex, str, bytes, bytearray, type(None), type(...), type, slice, range})
# Alive, or programs: what they hold is not what a batch or an output is made of.
_OPAQUE = (nn.Module, Optimizer, DataLoader, Dataset, type, types.ModuleType, BaseException)
_FOREIGN = frozenset(
    ("_thread", "builtins", "collections", "datetime", "functools", "io", "itertools", "logging", "multiprocessing")
) | {"numpy", "pandas", "pathlib", "queue", "random", "re", "socket", "threading", "torch", "weakref"}
"""Whose objects are no containers of ours to open; `torch.distributions` excepted."""

Children = list[tuple[str, Any]]


def storage(tree: Any) -> dict[str, Any]:
    """Return what an object holds in its `__dict__` and slots, in that order, without running code of its class."""
    try:
        held = object.__getattribute__(tree, "__dict__")
    except Exception:
        held = None
    found: dict[str, Any] = dict(held) if type(held) is dict else {}
    for cls in type.__dict__["__mro__"].__get__(type(tree)):
        for name, member in list(cls.__dict__.items()):
            if type(member) is types.MemberDescriptorType:
                try:
                    found.setdefault(name, member.__get__(tree, cls))
                except AttributeError:
                    continue  # never filled
    return found


def _fields(cls: type) -> tuple[str, ...] | None:
    """Return the names of a dataclass's fields; None for any other class."""
    for ancestor in type.__dict__["__mro__"].__get__(cls):
        fields = ancestor.__dict__.get("__dataclass_fields__")
        if type(fields) is dict:
            return tuple(str(name) for name in fields)
    return None


def _sequence(tree: Any, cls: type) -> Children | None:
    for base in (tuple, list, set, frozenset, deque):
        if issubclass(cls, base):
            return [(str(i), item) for i, item in enumerate(base.__iter__(tree)) if type(item) not in _SCALARS]
    return None


def _entries(tree: dict[Any, Any]) -> Children:
    return [(str(key), item) for key, item in dict.items(tree) if type(item) not in _SCALARS]


def _behind(tree: Any) -> tuple[str, dict[Any, Any]] | None:
    """Return the dict that stands behind a mapping of the user's making, with the name of its attribute."""
    held = storage(tree)
    names = ("data", *held) if issubclass(type(tree), UserDict) else tuple(held)
    return next(((n, held[n]) for n in names if issubclass(type(held.get(n)), dict)), None)


def _mapping(tree: Any, cls: type) -> Children | None:
    if issubclass(cls, dict):
        return _entries(tree)
    if cls is types.MappingProxyType:
        return [(str(key), item) for key, item in tree.items() if type(item) not in _SCALARS]
    if issubclass(cls, ChainMap):
        maps = [m for m in storage(tree).get("maps", ()) if issubclass(type(m), dict)]
        return _entries({key: item for m in reversed(maps) for key, item in dict.items(m)})
    if issubclass(cls, Mapping):
        behind = _behind(tree)
        if behind is None:
            return []
        return _entries(behind[1])
    return None


def children(tree: Any, *, objects: bool = False) -> Children:
    """Return the named things that a container holds; numbers and strings are left out, anything else holds nothing.

    Args:
        tree: tuples, lists, sets, deques, mappings, dataclasses; a `UserDict` or another mapping with a dict behind it.
        objects: open any other object too, that holds its data in attributes (attrs, a distribution, a graph).
    """
    cls = type(tree)
    if cls in _SCALARS or issubclass(cls, Tensor) or issubclass(cls, _OPAQUE):
        return []
    try:
        found = _sequence(tree, cls)
        if found is None:
            found = _mapping(tree, cls)
        if found is None and issubclass(cls, UserList):
            found = _sequence(storage(tree).get("data", ()), list)
        return _attributes(tree, cls, objects=objects) if found is None else found
    except Exception:
        return []


def _attributes(tree: Any, cls: type, *, objects: bool) -> Children:
    fields = _fields(cls)
    if fields is None and not (objects and _holds_data(cls)):
        return []
    held = storage(tree)
    names = fields if fields is not None else tuple(n for n in held if not n.startswith("__"))
    return [(name, held[name]) for name in names if name in held and type(held[name]) not in _SCALARS]


def _holds_data(cls: type) -> bool:
    if any("__next__" in c.__dict__ for c in type.__dict__["__mro__"].__get__(cls)):
        return False
    module = str(cls.__dict__.get("__module__", ""))
    return module.split(".")[0] not in _FOREIGN or module.startswith("torch.distributions")


def walk(
    tree: Any, leaf: str = "", *, objects: bool = False, stop_at: tuple[type, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """Yield (leaf, tensor) for each tensor in the tree, in order; and what is of the types `stop_at`, unopened.

    `leaf` is the way to the tensor: `""` for a bare tensor, else keys and positions joined by dots: `1.0`, `logits`.
    """
    wanted = (Tensor, *stop_at)
    if issubclass(type(tree), wanted):
        yield leaf, tree
        return
    ways: list[tuple[int, str, Iterator[tuple[str, Any]]]] = []
    above: set[int] = set()
    visits = 0

    def enter(tree: Any, leaf: str) -> None:
        items = children(tree, objects=objects) if len(ways) < MAX_DEPTH and id(tree) not in above else []
        if items:
            above.add(id(tree))
            ways.append((id(tree), f"{leaf}." if leaf else "", iter(items)))

    enter(tree, leaf)
    while ways and visits < MAX_VISITS:
        key, prefix, items = ways[-1]
        step = next(items, None)
        if step is None:
            ways.pop()
            above.discard(key)
            continue
        visits += 1
        name, item = step
        if issubclass(type(item), wanted):
            yield prefix + name, item
        else:
            enter(item, prefix + name)


def tensors_of(tree: Any, leaf: str = "", *, objects: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield (leaf, tensor) for each tensor in the tree, in order (see `walk`)."""
    return walk(tree, leaf, objects=objects)


def pick(tree: Any, leaf: str) -> Tensor:
    """Return the tensor at `leaf`; raises KeyError where there is none."""
    for name, tensor in tensors_of(tree):
        if name == leaf:
            return tensor
    raise KeyError(leaf)


def find(tree: Any, *names: str) -> Any:
    """Return the first of these entries or attributes that a tree holds at its top, or None.

    Numbers and strings are not told from nothing: what is asked for is a tensor or holds one.
    """
    held = dict(children(tree, objects=True))
    return next((held[name] for name in names if name in held), None)


def map_tensors(tree: Any, fn: Callable[[Tensor, str], Any], leaf: str = "") -> Any:
    """Return the tree with `fn(tensor, leaf)` in place of each tensor, and the tree itself where nothing changed.

    A result of None keeps the tensor. Plain objects are not opened: they can't be built anew.
    """
    return _mapped(tree, fn, leaf, ())


def _mapped(tree: Any, fn: Callable[[Tensor, str], Any], leaf: str, above: tuple[int, ...]) -> Any:
    if issubclass(type(tree), Tensor):
        new = fn(tree, leaf)
        return tree if new is None else new
    if len(above) >= MAX_DEPTH or id(tree) in above:
        return tree
    prefix = f"{leaf}." if leaf else ""
    changed = {}
    for name, item in children(tree):
        new = _mapped(item, fn, prefix + name, (*above, id(tree)))
        if new is not item:
            changed[name] = new
    return _rebuilt(tree, changed) if changed else tree


def _rebuilt(tree: Any, changed: Mapping[str, Any]) -> Any:
    cls = type(tree)
    if issubclass(cls, (tuple, list, set, frozenset, deque)):
        items = [changed.get(str(i), item) for i, item in enumerate(tree)]
        if hasattr(cls, "_fields"):  # named tuples, PackedSequence among them, take their fields one by one
            return cls(*items)
        return cls(items)
    if issubclass(cls, Mapping):
        return _rebuilt_mapping(tree, cls, changed)
    if issubclass(cls, UserList):
        rebuilt = copy.copy(tree)
        rebuilt.data = _rebuilt(rebuilt.data, changed)
        return rebuilt
    # Not `copy.copy`, which asks a dataclass with slots for the fields that were never filled.
    rebuilt = object.__new__(cls)
    for name, value in {**storage(tree), **changed}.items():
        object.__setattr__(rebuilt, name, value)  # frozen ones too
    return rebuilt


def _rebuilt_mapping(tree: Any, cls: type, changed: Mapping[str, Any]) -> Any:
    if cls is types.MappingProxyType:
        return types.MappingProxyType({key: changed.get(str(key), item) for key, item in tree.items()})
    rebuilt = copy.copy(tree)
    target = rebuilt
    if not issubclass(cls, (dict, ChainMap, UserDict)):
        behind = _behind(tree)
        assert behind is not None
        # A shallow copy would share it with the user's own.
        name, target = behind[0], copy.copy(behind[1])
        object.__setattr__(rebuilt, name, target)
    for key in list(target):
        if str(key) in changed:
            target[key] = changed[str(key)]
    return rebuilt
