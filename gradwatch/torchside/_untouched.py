"""A model run once more, of which nothing stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ._devices import random_state, set_random_state

__all__ = ["untouched"]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put the random states and all buffers back afterwards, bit for bit. Gradients are the caller's to leave alone."""
    rng = random_state()
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in buffers:
                buffer.copy_(copy)
        set_random_state(rng)
