"""Random generators of the user's own that a loss function reaches: put back like the global ones."""

from __future__ import annotations

import random
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from ..torchside import storage

__all__ = ["generators_kept"]

_GENERATORS = (torch.Generator, np.random.RandomState, np.random.Generator, random.Random)
DEPTH = 5
MOST = 20_000


@contextmanager
def generators_kept(*functions: Any) -> Iterator[None]:
    """Put back, afterwards, the generators in what functions close over, are bound to, or hold."""
    kept = [(generator, _state(generator)) for generator in _reached(functions)]
    try:
        yield
    finally:
        for generator, state in kept:
            _set_state(generator, state)


def _reached(roots: Any) -> list[Any]:
    found: dict[int, Any] = {}
    met: set[int] = set()
    level = list(roots)
    for _ in range(DEPTH):
        deeper: list[Any] = []
        for item in level:
            if id(item) in met or len(met) > MOST:
                continue
            met.add(id(item))
            if isinstance(item, _GENERATORS):
                found[id(item)] = item
            else:
                deeper += _held(item)
        level = deeper
    return list(found.values())


def _held(item: Any) -> list[Any]:
    if isinstance(item, partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, dict):
        return list(item.values())
    if isinstance(item, (list, tuple)):
        return list(item[:64])
    if isinstance(item, types.MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, types.FunctionType):
        return [found for cell in item.__closure__ or () if (found := _contents(cell)) is not None]
    if isinstance(item, (torch.Tensor, np.ndarray, str, bytes, int, float, type, types.ModuleType)) or item is None:
        return []
    return list(storage(item).values())


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else dict(generator.bit_generator.state)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, (torch.Generator, np.random.RandomState)):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state
