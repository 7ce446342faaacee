"""Where a run takes place: on the CPU, or on the late device; without a compiler on the CPU with late numbers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gradwatch.watch._measuring import Measuring
from gradwatch.watch._transfer import Transfer

from .device import is_there, late

__all__ = ["CPU", "LAGS", "Place", "at"]

LAGS = (0, 1, 2, 5)


@dataclass
class Place:
    """Where a run takes place.

    Attributes:
        lag: after how many steps numbers arrive; None on the CPU as it is.
        device: of models and batches.
        is_real: whether it is the late device, and not the stand-in for it.
    """

    lag: int | None
    device: torch.device
    is_real: bool
    now: int = 0

    def tick(self) -> None:
        """Say that a step is over."""
        self.now += 1
        if self.is_real:
            late().tick()

    @property
    def is_late(self) -> bool:
        return self.lag is not None

    def break_device(self) -> None:
        """Let the device fail: every event raises from here on. Nothing happens on the CPU."""
        if self.is_real:
            late().broken = True
        _Slow.broken = not self.is_real and self.is_late


CPU = Place(None, torch.device("cpu"), is_real=False)


@contextmanager
def at(lag: int | None, *, stands_in: bool = False) -> Iterator[Place]:
    """Enter the CPU (None) or a place whose numbers come `lag` steps late; `stands_in`: as if there were no device."""
    if lag is None:
        yield Place(None, torch.device("cpu"), is_real=False)
    elif not stands_in and is_there():
        late().set_lag(lag)
        try:
            yield Place(lag, torch.device("late:0"), is_real=True)
        finally:
            late().broken = False
            late().set_lag(0)
    else:
        with _slow_transfers() as place:
            place.lag = lag
            yield place


class _Slow(Transfer):
    """The stand-in: numbers of CPU tensors whose arrival is noticed late."""

    place: Any = None
    broken = False

    def __init__(self, parts: Any, *more: Any, **named: Any) -> None:
        super().__init__(parts, *more, **named)
        self._at = self.place.now

    @property
    def ready(self) -> bool:
        if _Slow.broken:
            raise RuntimeError("device-side assert triggered")
        return self.place.now - self._at >= self.place.lag


@contextmanager
def _slow_transfers() -> Iterator[Place]:
    place = _Slow.place = Place(0, torch.device("cpu"), is_real=False)
    users = [m for n, m in list(sys.modules.items()) if n.startswith("gradwatch.watch") and hasattr(m, "Transfer")]
    for module in users:
        module.Transfer = _Slow  # type: ignore[attr-defined]
    at_once = Measuring._at_once
    # What the host finds itself, of tensors on the CPU, would never be late.
    Measuring._at_once = lambda *_: None  # type: ignore[method-assign]
    try:
        yield place
    finally:
        _Slow.broken = False
        Measuring._at_once = at_once  # type: ignore[method-assign]
        for module in users:
            module.Transfer = Transfer  # type: ignore[attr-defined]
