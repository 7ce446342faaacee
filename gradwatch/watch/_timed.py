"""How long gradwatch itself takes, so that the report can say it; and numpy as gradwatch has it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from time import perf_counter
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np

__all__ = ["calm_numpy", "timed"]


class _Clocked(Protocol):
    spent: float
    is_timed: bool


P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=_Clocked)


def timed(method: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
    """Add the wall time of a method to its object's `spent`; a call inside a timed call counts once."""

    @wraps(method)
    def wrapper(self: C, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        if self.is_timed:
            return method(self, *args, **kwargs)
        self.is_timed, start = True, perf_counter()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.is_timed = False
            self.spent += perf_counter() - start

    return wrapper


def calm_numpy(function: Callable[P, R]) -> Callable[P, R]:
    """Keep numpy from raising or warning inside a function, as the user may have it do where numbers overflow: to
    gradwatch these are results."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return wrapper
