"""Optimizers that write the same parameters: one, or a wrapper and those that it holds under whatever name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..torchside import storage
from ._clean import fires, has_own_step, is_clean
from ._inventory import is_trainers

__all__ = ["Family"]


class Family:
    """All optimizers by which the parameters of one are written.

    Args:
        raw: the torch optimizer inside.
        given: what the user's loop steps: the same, or a wrapper.

    Attributes:
        members: optimizers that move parameters, wrappers of trainers apart.
        hooked: those whose step tells of itself.
        name: class of the outermost one that is not a trainer's.
        learned: one of them was seen to move something at a step without gradients.
    """

    def __init__(self, raw: Any, given: Sequence[Any] = ()) -> None:
        found: dict[int, Any] = {}
        for optimizer in (raw, *given):
            for member in _held(optimizer, _parameters(raw), 4):
                found.setdefault(id(member), member)
        self.members = tuple(member for member in found.values() if not is_trainers(member)) or (raw,)
        self.hooked = tuple(member for member in self.members if fires(member))
        self.learned = False
        self.name = type(next((o for o in given if not is_trainers(o)), raw)).__name__

    @property
    def is_clean(self) -> bool:
        """Whether all are known to move nothing without gradients."""
        return not self.learned and all(map(is_clean, self.members))

    @property
    def ends_unseen(self) -> bool:
        """Whether one whose step does not tell of itself may write after the others have."""
        return len(self.hooked) < len(self.members) or not all(map(has_own_step, self.members))

    @property
    def parameters(self) -> list[Tensor]:
        found = {id(p): p for o in self.members for p in _tensors(o)}
        return list(found.values())


def _held(optimizer: Any, parameters: frozenset[int], depth: int) -> Iterator[Any]:
    """Yield an optimizer and those that it holds, for some of these parameters."""
    if not _parameters(optimizer) & parameters or not callable(_attribute(optimizer, "step")):
        return
    yield optimizer
    if depth:
        for value in storage(optimizer).values():
            for item in _each(value):
                if item is not optimizer and _may_be_optimizer(item):
                    yield from _held(item, parameters, depth - 1)


def _each(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(dict.values(value)) if len(value) <= 64 else ()
    if isinstance(value, (list, tuple)):
        return list(value) if len(value) <= 64 else ()
    return (value,)


def _may_be_optimizer(item: Any) -> bool:
    return isinstance(item, Optimizer) or hasattr(type(item), "param_groups") or "param_groups" in storage(item)


def _tensors(optimizer: Any) -> list[Tensor]:
    groups = _attribute(optimizer, "param_groups")
    try:
        return [p for group in groups for p in group["params"]]
    except Exception:
        return []


def _parameters(optimizer: Any) -> frozenset[int]:
    return frozenset(map(id, _tensors(optimizer)))


def _attribute(given: Any, name: str) -> Any:
    # A wrapper's properties may raise.
    try:
        return getattr(given, name, None)
    except Exception:
        return None
