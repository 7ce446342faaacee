"""How long gradwatch itself takes, so that the report can say it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

__all__ = ["timed"]


class _Clocked(Protocol):
    spent: float


P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=_Clocked)
_running: set[int] = set()


def timed(method: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
    """Add the wall time of a method to its object's `spent`; a call inside a timed call counts once."""

    @wraps(method)
    def wrapper(self: C, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        if id(self) in _running:
            return method(self, *args, **kwargs)
        _running.add(id(self))
        start = time.perf_counter()
        try:
            return method(self, *args, **kwargs)
        finally:
            _running.discard(id(self))
            self.spent += time.perf_counter() - start

    return wrapper
