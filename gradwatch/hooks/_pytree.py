"""Trees of tensors: tuples, named tuples, lists, mappings, dataclasses, to any depth.

Torch's own pytree is private and does not know dataclasses; anything unknown counts as one opaque leaf.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

__all__ = ["map_tensors", "pick", "tensors_of"]


def _children(tree: Any) -> list[tuple[str, Any]] | None:
    """Return the named children of a container, or None for anything else."""
    if isinstance(tree, (tuple, list)):
        return [(str(i), item) for i, item in enumerate(tree)]
    if isinstance(tree, Mapping):
        return [(str(key), item) for key, item in tree.items()]
    if is_dataclass(tree) and not isinstance(tree, type):
        return [(f.name, getattr(tree, f.name)) for f in fields(tree) if hasattr(tree, f.name)]
    return None


def _rebuild(tree: Any, new: list[Any]) -> Any:
    if isinstance(tree, (tuple, list)):
        if hasattr(tree, "_fields"):  # named tuples, PackedSequence among them, take their fields one by one
            return type(tree)(*new)
        return type(tree)(new)
    rebuilt = copy.copy(tree)
    if isinstance(tree, Mapping):
        for key, value in zip(tree, new, strict=True):
            rebuilt[key] = value
    else:
        for (name, old), value in zip(_children(tree) or (), new, strict=True):
            if value is not old:
                object.__setattr__(rebuilt, name, value)  # frozen dataclasses too
    return rebuilt


def map_tensors(tree: Any, fn: Callable[[Tensor, str], Any], leaf: str = "") -> Any:
    """Return the tree with `fn(tensor, leaf)` in place of each tensor, and the tree itself where nothing changed.

    `leaf` is the way to the tensor: `""` for a bare tensor, else keys and positions joined by dots: `1.0`, `logits`.
    A result of None keeps the tensor.
    """
    if isinstance(tree, Tensor):
        new = fn(tree, leaf)
        return tree if new is None else new
    children = _children(tree)
    if not children:
        return tree
    prefix = f"{leaf}." if leaf else ""
    items = [map_tensors(item, fn, prefix + name) for name, item in children]
    if all(new is old for new, (_, old) in zip(items, children, strict=True)):
        return tree
    return _rebuild(tree, items)


def tensors_of(tree: Any, leaf: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (leaf, tensor) for each tensor in the tree, in order."""
    if isinstance(tree, Tensor):
        yield leaf, tree
        return
    prefix = f"{leaf}." if leaf else ""
    for name, item in _children(tree) or ():
        yield from tensors_of(item, prefix + name)


def pick(tree: Any, leaf: str) -> Tensor:
    """Return the tensor at `leaf`; raises KeyError where there is none."""
    for name, tensor in tensors_of(tree):
        if name == leaf:
            return tensor
    raise KeyError(leaf)
