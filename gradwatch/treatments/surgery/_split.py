"""`split`: the one line a training step needs for its losses to be known as tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import reduce
from operator import add
from typing import Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from ...errors import ConfigError

__all__ = ["collecting", "plain_sum", "split"]


class Collector(Protocol):
    def begin(self, losses: Mapping[str, Tensor]) -> Tensor: ...


_collector: ContextVar[ReferenceType[Collector] | None] = ContextVar("gradwatch_collector", default=None)


def split(**losses: Tensor) -> Tensor:
    """Return the sum of the task losses; where surgery or conflict diagnosis is on, make them known to it.

    Without gradwatch watching, under `no_grad` and outside training this is `a + b + ...` and nothing else. Terms that
    belong to no task are added to the result: `split(seg=seg, depth=depth) + 1e-4 * penalty`.

    Args:
        **losses: scalar loss of each task, still attached to the graph.

    Raises:
        ConfigError: no loss was given.
    """
    if not losses:
        raise ConfigError("split() needs the loss of each task by name: split(seg=seg_loss, depth=depth_loss).")
    reference = _collector.get()
    collector = None if reference is None else reference()
    if collector is None or not torch.is_grad_enabled():
        return plain_sum(losses)
    return collector.begin(losses)


def plain_sum(losses: Mapping[str, Tensor]) -> Tensor:
    """Return a + b + ..., in the order given."""
    return reduce(add, losses.values())


@contextmanager
def collecting(collector: Collector) -> Iterator[None]:
    """Hand the losses of `split` calls inside to this collector. Nests; nothing stays behind."""
    token = _collector.set(ref(collector))
    try:
        yield
    finally:
        with suppress(ValueError):  # left in another context, whose own value stands
            _collector.reset(token)
