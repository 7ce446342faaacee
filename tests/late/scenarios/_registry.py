"""The list of scenarios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..places import Place
from ..story import Allowed, Story

__all__ = ["SCENARIOS", "Scenario", "scenario"]

Run = Callable[[Place], Story]


@dataclass(frozen=True)
class Scenario:
    """A run to be told at several places.

    Attributes:
        run: asserts what holds everywhere, and returns the story.
        allowed: by what a late place may differ.
        needs_device: it can't be told on the stand-in, whose tensors are the CPU's.
        seldom: there are many of its kind: with some lags it is told in the slow suite only.
    """

    name: str
    run: Run
    allowed: Allowed
    needs_device: bool
    seldom: bool


SCENARIOS: dict[str, Scenario] = {}


def scenario(*, needs_device: bool = False, seldom: bool = False, **allowed: Any) -> Callable[[Run], Run]:
    """Put a function on the list; see `Allowed`."""

    def put(run: Run) -> Run:
        name = run.__name__.replace("_", "-")
        assert name not in SCENARIOS
        SCENARIOS[name] = Scenario(name, run, Allowed(**allowed), needs_device, seldom)
        return run

    return put
