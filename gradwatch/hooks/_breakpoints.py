"""Stopping where a condition first holds: conditions ready-made, and what happens then."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._warn import warn
from ..errors import ConfigError, HookBreak, UnreadableError
from ..torchside import Values
from ._functions import Observer
from ._monitor import readable
from ._points import Point

__all__ = ["Condition", "dead", "exceeds", "non_finite"]

Condition = Callable[[Tensor, Point], Any]
"""`condition(tensor, point)`: a bool, or a tensor that is read as one."""


def _numbers(tensor: Tensor) -> Values:
    """Return the elements of a tensor, which the answer will be read from.

    Raises:
        UnreadableError: there are none to read.
    """
    if tensor.is_meta:
        raise UnreadableError("a tensor on the meta device has no numbers")
    return readable(tensor)


def non_finite(tensor: Tensor, point: Point | None = None) -> bool:
    """Return whether any element is nan or inf."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    return not bool(torch.isfinite(_numbers(tensor).piece).all())


def exceeds(limit: float) -> Condition:
    """Return the condition that a magnitude is above `limit`; nan counts as above."""
    if math.isnan(limit):
        raise ConfigError(f"`limit` is a number. Got {limit!r}.")

    def above(tensor: Tensor, point: Point | None = None) -> bool:
        piece = _numbers(tensor).piece
        return piece.numel() > 0 and not bool(piece.abs().max() <= limit)

    above.__name__ = f"exceeds({limit:g})"
    return above


def dead(tensor: Tensor, point: Point | None = None) -> bool:
    """Return whether every element is exactly zero."""
    piece, num_zeros = _numbers(tensor)
    return piece.numel() + num_zeros > 0 and not bool(piece.any())


class Break(Observer):
    """Asks a condition, and stops the first times it holds; then it is quiet until `reset`.

    Attributes:
        hits: what was found, each a `HookBreak`.
        skipped: why a ready-made condition could not read tensors at a point.
    """

    def __init__(
        self, condition: Condition, action: str | Callable[[HookBreak], Any], *, times: int | None = 1
    ) -> None:
        super().__init__(kind="break")
        if not callable(condition):
            raise ConfigError(f"a condition is called with (tensor, point). Got {condition!r}.")
        if action not in ("raise", "debugger") and not callable(action):
            raise ConfigError(f"`action` is 'raise', 'debugger' or a function of the HookBreak. Got {action!r}.")
        if times is not None and not times >= 1:
            raise ConfigError(f"`times` is a number from 1 up, or None for every time. Got {times!r}.")
        self.condition, self.action, self.times = condition, action, times
        self.hits: list[HookBreak] = []
        self.skipped: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def hit(self) -> HookBreak | None:
        """The last that was found, or None."""
        return self.hits[-1] if self.hits else None

    @property
    def _is_done(self) -> bool:
        return self.times is not None and len(self.hits) >= self.times

    def observe(self, tensor: Tensor, point: Point) -> None:
        if self._is_done or not self._holds(tensor, point):
            return
        with self._lock:
            if self._is_done:
                return
            what = getattr(self.condition, "__name__", type(self.condition).__name__)
            hit = HookBreak(point.hook.id, point, tensor.detach().clone(), f"{what} held")
            self.hits.append(hit)
        if callable(self.action):
            self.action(hit)
        elif self.action == "raise":
            raise hit
        else:
            # The tensor, the point and the HookBreak (hit) are at hand in this frame.
            breakpoint()

    def _holds(self, tensor: Tensor, point: Point) -> bool:
        try:
            return bool(self.condition(tensor, point))
        except UnreadableError as unreadable:
            if point.name not in self.skipped:
                self.skipped[point.name] = str(unreadable)
                if len(self.skipped) == 1:
                    warn(f"a break condition passes over {point.name!r}: {unreadable}.")
            return False

    def reset(self) -> None:
        self.hits.clear()
        self.skipped.clear()
