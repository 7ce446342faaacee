"""Put back everything that a trial run may have changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..torchside import random_state, set_random_state

__all__ = ["same_randomness", "unchanged"]

_DICTS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Run the body, then restore the model and all random states, bitwise, also when the body raises.

    Restored are values, gradients and `requires_grad` of parameters, values of buffers, modes, hooks, plain attributes
    of the modules (what an attribute refers to: a list that the forward appends to stays longer), and the states of
    Python's, numpy's and torch's generators on every device. Needs memory for one copy of parameters and buffers.
    """
    tensors = [*model.parameters(), *model.buffers()]
    values = [t.detach().clone() for t in tensors]
    leaves = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    attributes = [
        (m, dict(m.__dict__), {name: dict(m.__dict__.get(name, {})) for name in _DICTS}) for m in model.modules()
    ]
    states = _random_states()
    try:
        yield
    finally:
        for module, plain, dicts in attributes:
            module.__dict__.clear()
            module.__dict__.update(plain)
            for name, entries in dicts.items():
                _refill(module.__dict__.get(name), entries)
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                _put_back(tensor, value)
        for parameter, grad, requires_grad in leaves:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        _set_random_states(states)


def _refill(live: Any, entries: dict[str, Any]) -> None:
    if live is not None and (live.keys() != entries.keys() or any(live[k] is not v for k, v in entries.items())):
        live.clear()
        live.update(entries)


def _put_back(tensor: Tensor, value: Tensor) -> None:
    # Untouched tensors are left alone, so that their version counters stay: a graph of the user's may hold them.
    if tensor.is_sparse or not _is_same(tensor, value):
        tensor.copy_(value)


def _is_same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _random_states() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": random_state()}


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    set_random_state(states["torch"])


@contextmanager
def same_randomness() -> Iterator[None]:
    """Run the body and set the generators back: the next body draws the same dropout masks."""
    states = _random_states()
    try:
        yield
    finally:
        _set_random_states(states)
