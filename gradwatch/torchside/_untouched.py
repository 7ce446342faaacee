"""A model run once more, and nothing of it left: random states, buffers and hooks on parameters as before."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._devices import random_state, set_random_state

__all__ = ["every_random_state", "set_every_random_state", "untouched"]


def every_random_state() -> dict[str, Any]:
    """Return the random states of torch (all devices in use), NumPy and Python."""
    return {"torch": random_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def set_every_random_state(state: Mapping[str, Any]) -> None:
    """Put an `every_random_state` back."""
    set_random_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put random states and buffers back, bit for bit.

    Meanwhile hooks on parameters' gradients are not called: they count and change what the optimizer gets.
    """
    state = every_random_state()
    copies = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with ExitStack() as stack:
        stack.callback(set_every_random_state, state)
        stack.callback(_put_back, copies)
        for param in model.parameters():
            hooks = getattr(param, "_backward_hooks", None)
            if hooks:
                stack.callback(hooks.update, dict(hooks))
                hooks.clear()
        yield


def _put_back(copies: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, copy in copies:
            # What is written to counts as changed, also by the same: a graph that has saved it would refuse to run.
            if not torch.equal(buffer, copy):
                buffer.copy_(copy)
