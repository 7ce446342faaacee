"""Stopping where a condition first holds: conditions ready-made, and what happens then."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, HookBreak
from ._functions import Observer
from ._points import Point

__all__ = ["Condition", "dead", "exceeds", "non_finite"]

Condition = Callable[[Tensor, Point], Any]
"""`condition(tensor, point)`: a bool, or a tensor that is read as one."""


def non_finite(tensor: Tensor, point: Point | None = None) -> bool:
    """Return whether any element is nan or inf."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    return not bool(torch.isfinite(tensor).all())


def exceeds(limit: float) -> Condition:
    """Return the condition that a magnitude is above `limit`; nan counts as above."""
    if math.isnan(limit):
        raise ConfigError(f"`limit` is a number. Got {limit!r}.")

    def above(tensor: Tensor, point: Point | None = None) -> bool:
        return tensor.numel() > 0 and not bool(tensor.detach().abs().max() <= limit)

    above.__name__ = f"exceeds({limit:g})"
    return above


def dead(tensor: Tensor, point: Point | None = None) -> bool:
    """Return whether every element is exactly zero."""
    return tensor.numel() > 0 and not bool(tensor.detach().any())


class Break(Observer):
    """Asks a condition, and stops the first time it holds; then it is quiet until `reset`.

    Attributes:
        hit: what was found: the `HookBreak`, or None.
    """

    def __init__(self, condition: Condition, action: str | Callable[[HookBreak], Any]) -> None:
        super().__init__(kind="break")
        if not callable(condition):
            raise ConfigError(f"a condition is called with (tensor, point). Got {condition!r}.")
        if action not in ("raise", "debugger") and not callable(action):
            raise ConfigError(f"`action` is 'raise', 'debugger' or a function of the HookBreak. Got {action!r}.")
        self.condition, self.action = condition, action
        self.hit: HookBreak | None = None
        self._lock = threading.Lock()

    def observe(self, tensor: Tensor, point: Point) -> None:
        if self.hit is not None or not bool(self.condition(tensor, point)):
            return
        with self._lock:
            if self.hit is not None:
                return
            what = getattr(self.condition, "__name__", type(self.condition).__name__)
            self.hit = HookBreak(point.hook.id, point, tensor.detach().clone(), f"{what} held")
        if callable(self.action):
            self.action(self.hit)
        elif self.action == "raise":
            raise self.hit
        else:
            # The tensor, the point and the HookBreak (self.hit) are at hand in this frame.
            breakpoint()

    def reset(self) -> None:
        self.hit = None
