"""Whatever happens in a run, the same is told of it, and done about it, however late numbers arrive."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest

from .device import has_compiler
from .loops import tell
from .places import LAGS, at
from .process import on_late
from .scenarios import SCENARIOS
from .story import Story, differences

NOT_YET: dict[str, str] = {}
"""Scenarios that do not hold yet where numbers are late, and why; with a lag, where only that one fails."""


def _not_yet(why: str, *names: str, lags: tuple[int, ...] = LAGS) -> None:
    NOT_YET.update({f"{name}/{lag}": why for name in names for lag in lags})


OFTEN = (0, 2)
"""Lags with which also those scenarios are told of which there are many."""


@cache
def on_the_cpu(name: str) -> Story:
    with at(None) as place:
        return tell(SCENARIOS[name].run, place)


def case(name: str, lag: int) -> object:
    why = NOT_YET.get(f"{name}/{lag}", NOT_YET.get(name))
    marks: list[Any] = [] if why is None else [pytest.mark.xfail(reason=why, strict=has_compiler())]
    if SCENARIOS[name].seldom and lag not in OFTEN:
        marks.append(pytest.mark.slow)
    return pytest.param(name, lag, id=f"{name}-{lag}", marks=marks)


@pytest.mark.parametrize(("name", "lag"), [case(name, lag) for name in SCENARIOS for lag in LAGS])
@on_late
def test_the_story_is_the_cpus(name: str, lag: int) -> None:
    scenario = SCENARIOS[name]
    with at(lag) as place:
        if scenario.needs_device and not place.is_real:
            pytest.skip("needs the late device")
        told = tell(scenario.run, place)
    found = differences(on_the_cpu(name), told, scenario.allowed, lag)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", [name for name, s in SCENARIOS.items() if not (s.seldom or s.needs_device)])
def test_what_stands_in_for_the_device_tells_the_story_too(name: str) -> None:
    """Where there is no compiler all the others run on it."""
    scenario = SCENARIOS[name]
    with warnings.catch_warnings(), at(2, stands_in=True) as place:
        warnings.simplefilter("ignore")
        told = tell(scenario.run, place)
    found = differences(on_the_cpu(name), told, scenario.allowed, 2)
    assert not found, "\n".join(found)
