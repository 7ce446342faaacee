"""Numbers of the user's tensors, each on a guard of its own: one that can't be measured takes no other with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Missed", "Numbers", "Scalars"]

Scalars = dict[str, "Tensor | float"]
Missed = Callable[[str, Exception], object]
"""Told of what can't be measured (sparse tensors have no extremes, ...), and why."""


class Numbers:
    """What was found so far.

    Attributes:
        found: name -> float or 0-dim tensor.
    """

    def __init__(self, missed: Missed | None = None) -> None:
        self.found: Scalars = {}
        self._missed = missed

    def ask(self, of: str, ways: Sequence[Callable[..., Scalars]], *given: Any) -> None:
        """Add what each of these functions makes of the same arguments; `of`: whose numbers, as they are told of."""
        failed = [(way, error) for way in ways if (error := self._take(way, given)) is not None]
        if failed:
            names = ", ".join(way.__name__.strip("_").replace("_", " ") for way, _ in failed)
            self.miss(f"{'numbers' if len(failed) > 1 else 'a number'} of {of} ({names})", failed[0][1])

    def _take(self, way: Callable[..., Scalars], given: tuple[Any, ...]) -> Exception | None:
        try:
            self.found |= {name: _sound(value) for name, value in way(*given).items()}
        except Exception as error:
            # Its frames would hold the tensors.
            return error.with_traceback(None)
        return None

    def miss(self, what: str, error: Exception) -> None:
        """Tell that something can't be measured."""
        if self._missed is not None:
            self._missed(what, error)


def _sound(value: Tensor | float) -> Tensor | float:
    """Return a number that can travel with the others of the step."""
    if isinstance(value, Tensor) and (type(value) is not Tensor or value.is_meta or value.layout != torch.strided):
        raise TypeError(f"{type(value).__name__} on device {value.device}, layout {value.layout}: no plain number")
    return value
