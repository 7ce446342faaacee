"""What optimizers hold, found: parameters, tensors, plain numbers in groups, state, attributes and containers."""

from __future__ import annotations

import math
import pickle
import random
import types
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..torchside import pieces, storage

__all__ = ["Inventory", "Leaf", "is_trainers"]

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, np.generic)
# Alive, or programs: no memory of an optimizer.
_CLOSED = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, nn.Module)
_REFERENCES = (weakref.ReferenceType, weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
_TRAINERS = frozenset(("accelerate", "deepspeed", "gradwatch", "lightning", "lightning_fabric", "pytorch_lightning"))
_FOREIGN = _TRAINERS | {
    *("torch", "numpy", "transformers", "threading", "_thread", "logging", "io", "pathlib", "builtins", "abc", "typing")
}
"""Whose objects are not looked into; optimizers excepted."""
_BOOKKEEPING = frozenset(("step", "found_inf", "grad_scale", "_opt_called", "defaults"))
"""What schedulers and loss scalers keep on an optimizer, which go on at a step that is vetoed."""
MAX_DEPTH, MAX_VISITS = 12, 200_000


def is_trainers(optimizer: Any) -> bool:
    """Return whether this is a trainer's wrapper, that moves nothing by itself."""
    return type(optimizer).__module__.partition(".")[0] in _TRAINERS


class Leaf:
    """One tensor, and where it lay.

    Attributes:
        name: what a reader knows it by.
        tensor: the object.
        data: what it held, sharing its memory.
        is_parameter: of the model.
    """

    __slots__ = ("data", "is_parameter", "name", "tensor")

    def __init__(self, name: str, tensor: Tensor, is_parameter: bool) -> None:
        self.name, self.tensor, self.is_parameter = name, tensor, is_parameter
        self.data = tensor.detach()


class _Box:
    """One container or object, what it held, and how that is put back."""

    __slots__ = ("held", "kind", "name", "owner")

    def __init__(self, name: str, owner: Any, kind: _Kind) -> None:
        self.name, self.owner, self.kind = name, owner, kind
        self.held = kind.read(owner)

    @property
    def is_group(self) -> bool:
        """Whether this is a parameter group, in which schedulers write."""
        return self.kind.has_keys and self.name.startswith("group ") and " of " not in self.name

    def moved(self, spared: frozenset[str]) -> list[str]:
        """Return the names of what is not what it was; `spared`: what may change in a group."""
        now = self.kind.read(self.owner)
        if len(now) == len(self.held) and all(map(_same, now, self.held)):
            return []
        if not self.kind.has_keys:
            return [self.name]
        spared = spared if self.is_group else frozenset()
        before, after = _by_key(self.held), _by_key(now)
        gone = [key for key in before if key not in after]
        new = [key for key in after if key not in before or not _same(before[key], after[key])]
        found = [key for key in gone + new if key not in spared]
        return [f"{(before.get(key) or after[key])[0]} of {self.name}" for key in found]

    def plain(self) -> list[Any]:
        """Return the entries that are plain values."""
        if not self.kind.has_keys:
            return [item for item in self.held if isinstance(item, _VALUES)]
        return [(_word(key), value) for key, value in self.held if isinstance(value, _VALUES)]

    def accept(self, names: frozenset[str]) -> None:
        """Take some entries as they are now, where this is a group."""
        if self.is_group:
            now = {key: value for key, value in self.kind.read(self.owner) if key in names}
            self.held = [(key, now.get(key, value)) for key, value in self.held]

    def put_back(self, spared: frozenset[str]) -> None:
        held = self.held
        if spared and self.is_group:
            now = {key: value for key, value in self.kind.read(self.owner) if key in spared}
            held = [(key, now.pop(key, value)) for key, value in held] + list(now.items())
        self.kind.write(self.owner, held)


class Inventory:
    """All that optimizers hold at one moment, by walking what their objects store: no code of theirs runs.

    Args:
        optimizers: whose memory; those that they hold are found in them.
        name_of: the name of a parameter; None of what is none.
        parts: parameters that the optimizers' groups do not show now.

    Attributes:
        leaves: tensors, each once.
        boxes: containers and objects, outermost first.
    """

    def __init__(
        self, optimizers: Sequence[Any], name_of: Callable[[Tensor], str | None], parts: Sequence[Tensor] = ()
    ) -> None:
        self._name_of = name_of
        self._seen: set[int] = set()
        self._parameters = {id(p): p for o in optimizers for p in _parameters(o)} | {id(p): p for p in parts}
        self.leaves: list[Leaf] = []
        self.boxes: list[_Box] = []
        for p in self._parameters.values():
            self._tensor(p, "")
        for optimizer in optimizers:
            self._visit(optimizer, type(optimizer).__name__, 0)

    def contents(self) -> list[tuple[str, Any]]:
        """Return the bits of every tensor and all plain values, by name: equal for two runs that came to the same."""
        found: list[tuple[str, Any]] = []
        for leaf in self.leaves:
            found += [(leaf.name, f"{piece.dtype} {piece.cpu().tolist()}") for piece in pieces(leaf.tensor)]
        for box in self.boxes:
            found += [(box.name, repr(item)) for item in box.plain()]
        return found

    def _visit(self, value: Any, name: str, depth: int) -> None:
        if isinstance(value, (*_VALUES, *_CLOSED, *_REFERENCES)) or id(value) in self._seen:
            return
        if depth > MAX_DEPTH or len(self._seen) > MAX_VISITS:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self._tensor(value, name)
            return
        for kind in _KINDS:
            if isinstance(value, kind.classes):
                self._box(value, name, depth, kind)
                return
        if isinstance(value, (tuple, frozenset)):
            for i, item in enumerate(value):
                self._visit(item, f"{name}[{i}]", depth + 1)
        elif isinstance(value, Optimizer) or not _is_foreign(type(value)):
            self._box(value, name, depth, _OBJECT)
            for cls in type(value).__mro__:
                if id(cls) not in self._seen and not _is_foreign(cls):
                    self._seen.add(id(cls))
                    self._box(cls, f"the class {cls.__name__}", depth, _CLASS)

    def _box(self, value: Any, name: str, depth: int, kind: _Kind) -> None:
        box = _Box(name, value, kind)
        if not is_trainers(value):
            self.boxes.append(box)
        if kind.has_keys:
            for key, item in box.held:
                self._visit(item, self._part(name, key), depth + 1)
        elif kind.read is _items:
            for i, item in enumerate(box.held):
                is_group = name.endswith("param_groups")
                self._visit(item, f"group {i}" if is_group else f"{name}[{i}]", depth + 1)

    def _part(self, name: str, key: Any) -> str:
        if isinstance(key, Tensor):
            return f"the state of {self._name_of(key) or 'a parameter'}"
        return f"{key} of {name}" if name.startswith(("the state of", "group")) else f"{name}.{key}"

    def _tensor(self, tensor: Tensor, name: str) -> None:
        self._seen.add(id(tensor))
        is_parameter = id(tensor) in self._parameters
        if is_parameter:
            name = self._name_of(tensor) or f"parameter {list(self._parameters).index(id(tensor))}"
        self.leaves.append(Leaf(name, tensor, is_parameter))


def _parameters(optimizer: Any) -> list[Tensor]:
    try:
        return [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, Tensor)]
    except Exception:
        return []


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, tuple) and isinstance(b, tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(_same, a, b))
    if type(a) is not type(b) or not isinstance(a, _VALUES):
        return False
    return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def _by_key(items: list[Any]) -> dict[Any, tuple[Any, Any]]:
    return {(id(key) if isinstance(key, Tensor) else key): (_word(key), value) for key, value in items}


def _word(key: Any) -> str:
    return "what is kept of a tensor" if isinstance(key, Tensor) else str(key)


def _entries(owner: Any) -> list[Any]:
    return list(dict.items(owner))


def _put_entries(owner: Any, held: list[Any]) -> None:
    dict.clear(owner)
    for key, value in held:
        dict.__setitem__(owner, key, value)


def _items(owner: Any) -> list[Any]:
    return list(owner)


def _put_list(owner: Any, held: list[Any]) -> None:
    owner[:] = held


def _put_all(owner: Any, held: list[Any]) -> None:
    owner.clear()
    for item in held:
        (owner.add if isinstance(owner, set) else owner.append)(item)


def _attributes(owner: Any) -> list[Any]:
    held = storage(owner).items()
    if isinstance(owner, Optimizer):
        return [(k, v) for k, v in held if k not in _BOOKKEEPING and not k.startswith("_optimizer_")]
    return list(held)


def _put_attributes(owner: Any, held: list[Any]) -> None:
    kept, now = dict(held), dict(_attributes(owner))
    for name in now.keys() - kept.keys():
        object.__delattr__(owner, name)
    for name, value in kept.items():
        if name not in now or now[name] is not value:
            object.__setattr__(owner, name, value)


def _is_foreign(cls: type) -> bool:
    return cls is object or cls.__module__.partition(".")[0] in _FOREIGN


def _of_class(owner: Any) -> list[Any]:
    # What instances share: a count of all steps, a table. No methods, slots or constants of Python's own.
    held: tuple[Any, ...] = (*_VALUES, Tensor, *(each for kind in _KINDS for each in _classes(kind)))
    return [(k, v) for k, v in vars(owner).items() if isinstance(v, held) and not k.startswith("__")]


def _put_of_class(owner: Any, held: list[Any]) -> None:
    kept, now = dict(held), dict(_of_class(owner))
    for name in now.keys() - kept.keys():
        delattr(owner, name)
    for name, value in kept.items():
        if name not in now or now[name] is not value:
            setattr(owner, name, value)


def _bytes(owner: Any) -> list[Any]:
    return [owner.tobytes()]


def _put_bytes(owner: Any, held: list[Any]) -> None:
    owner[...] = np.frombuffer(held[0], owner.dtype).reshape(owner.shape)


def _drawn(owner: Any) -> list[Any]:
    if isinstance(owner, torch.Generator):
        return [bytes(owner.get_state().numpy())]
    return [owner.getstate() if isinstance(owner, random.Random) else pickle.dumps(owner.bit_generator.state)]


def _put_drawn(owner: Any, held: list[Any]) -> None:
    if isinstance(owner, torch.Generator):
        owner.set_state(torch.frombuffer(bytearray(held[0]), dtype=torch.uint8))
    elif isinstance(owner, random.Random):
        owner.setstate(held[0])
    else:
        owner.bit_generator.state = pickle.loads(held[0])


class _Kind(NamedTuple):
    """How containers of some classes are read and written; `has_keys`: what is read are pairs."""

    classes: Any
    read: Callable[[Any], list[Any]]
    write: Callable[[Any, list[Any]], None]
    has_keys: bool = False


def _classes(kind: _Kind) -> tuple[Any, ...]:
    return kind.classes if isinstance(kind.classes, tuple) else (kind.classes,)


_OBJECT = _Kind(object, _attributes, _put_attributes, has_keys=True)
_CLASS = _Kind(type, _of_class, _put_of_class, has_keys=True)
_KINDS = (
    _Kind(dict, _entries, _put_entries, has_keys=True),
    _Kind(list, _items, _put_list),
    _Kind((deque, set), _items, _put_all),
    _Kind((torch.Generator, random.Random, np.random.Generator), _drawn, _put_drawn),
    _Kind(np.ndarray, _bytes, _put_bytes),
)
