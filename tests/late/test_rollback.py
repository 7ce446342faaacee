"""Snapshots on a device whose numbers come late: nobody waits for them, and what comes back is what was there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gradwatch.rules import Expression
from gradwatch.treatments import Rollback

from .device import there
from .loops import Loop, adamw, fused, momentum, quiet
from .places import Place
from .process import on_late


def rule(step: int, **settings: Any) -> Expression:
    return Expression(f"step == {step}", name="trouble", keep_firing_for=0, then=Rollback(**{"steps": 10, **settings}))


def state(loop: Loop) -> list[torch.Tensor]:
    held = [*loop.model.parameters(), *loop.model.buffers()]
    held += [t for s in loop.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    if loop.scaler is not None and loop.scaler._scale is not None:
        held.append(loop.scaler._scale)
    return [t.detach().cpu().clone() for t in held]


@pytest.mark.parametrize("optimizer", [momentum, adamw, fused])
@on_late
def test_snapshots_are_taken_without_a_wait(optimizer: Any) -> None:
    device = there()
    device.set_lag(2)
    place = Place(2, torch.device("late:0"), is_real=True)
    with quiet(), device.counting() as counts:
        loop = Loop(place, optimizer=optimizer, rules=[rule(1000, steps=3, every=3)])
        loop.steps(14)
        found, stacks = dict(counts), list(device.stacks)
        held = loop.watch.session.engine.rollbacks.snapshots.held
        assert [s.step for s in held] == [9, 12]
        loop.watch.close()
    assert not loop.watch.session.engine.guard.failed, loop.watch.session.engine.guard.failed
    assert not found, stacks[:3]


CASES = [
    pytest.param(lag, scale, storage, marks=[] if (lag, scale, storage) == (2, 64.0, "host") else pytest.mark.slow)
    for lag in (0, 2, 5)
    for scale in (None, 64.0)
    for storage in ("host", "disk")
]


@pytest.mark.parametrize(("lag", "scale", "storage"), CASES)
@on_late
def test_what_comes_back_is_bit_for_bit_what_was_there(lag: int, scale: float | None, storage: str) -> None:
    device = there()
    device.set_lag(lag)
    place = Place(lag, torch.device("late:0"), is_real=True)
    with quiet():
        loop = Loop(place, optimizer=adamw, scale=scale, rules=[rule(60, storage=storage)])
        states, back = {}, -1
        with loop.watch:
            for step in range(1, 80):
                loop.once()
                states[step] = state(loop)
                if back < 0 and "rolled_back_to" in dict(
                    loop.watch.incidents[0].details if loop.watch.incidents else {}
                ):
                    back = step
            details = loop.watch.incidents[0].details
    assert details["rolled_back_to"] == 26
    assert details["rolled_back_from"] == back - 1
    assert 60 <= back - 1 <= 60 + 16 + lag
    assert all(map(torch.equal, states[back], states[26]))


@on_late
def test_steps_whose_numbers_were_on_their_way_at_a_return_ask_for_no_second_one() -> None:
    """They were taken on the way that was left, and are judged as a part of it."""
    device = there()
    device.set_lag(5)

    def run(last: int) -> list[tuple[float, float]]:
        trouble = Expression(
            f"step >= 60 and step <= {last}", name="trouble", keep_firing_for=0, then=Rollback(steps=10)
        )
        with quiet():
            loop = Loop(Place(5, torch.device("late:0"), is_real=True), optimizer=adamw, rules=[trouble])
            with loop.watch:
                loop.steps(110)
                records = list(loop.watch.history)
        names = "rolled_back_from", "rolled_back_to"
        return [tuple(r.scalars[name] for name in names) for r in records if names[0] in r.scalars]

    ((back, to),) = run(last=60)
    assert run(last=int(back)) == [(back, to)]
