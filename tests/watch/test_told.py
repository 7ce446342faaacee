"""What a run says of itself while it goes: which lines are printed, and how long gradwatch took."""

import itertools

import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch._text import listed
from gradwatch.rules import Expression, NonFinite
from gradwatch.watch import _timed


def train(steps: int, **options) -> Watch:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.01), on_error="raise", **options) as watch:
        for _ in range(steps):
            model(torch.ones(4, 3)).square().mean().backward()
            watch.step()
            model.zero_grad()
    return watch


def test_what_is_only_to_be_known_is_kept_and_not_printed(caplog: pytest.LogCaptureFixture) -> None:
    rules = [Expression("step == 2", name=level, severity=level) for level in ("info", "warning", "critical")]
    watch = train(5, rules=rules)
    assert sorted(i.name for i in watch.incidents) == ["critical", "info", "warning"]
    lines = [record.getMessage() for record in caplog.records]
    assert [[f"[{level}]" in line for level in ("warning", "critical")] for line in lines] == [
        [True, False],
        [False, True],
    ]


@pytest.mark.parametrize("which", ["gradient", "loss", "both"])
def test_what_is_not_finite_is_told_within_two_steps_though_nobody_asks(
    which: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(3, 2)
    heard: list[int] = []
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.0), on_error="raise", rules=[NonFinite()]) as watch:
        for step in range(30):
            bad = float("nan") if step == 20 else 1.0
            (model(torch.ones(4, 3)).square().mean() * (1.0 if which == "loss" else bad)).backward()
            watch.step(loss=1.0 if which == "gradient" else bad)
            model.zero_grad()
            heard.append(len(caplog.records))
    assert heard[:20] == [0] * 20
    assert all(heard[22:])


def test_a_record_tells_the_time_that_was_spent_since_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(_timed, "perf_counter", lambda: float(next(clock)))
    watch = train(12, rules="observe", updates_every=100, activations_every=100, histograms_every=100)
    # A reading of this clock is a second, and every timed call of a step takes two: one to begin, one to end.
    spent = [record.scalars["overhead_seconds"] for record in watch.history]
    assert len(set(spent[2:])) == 1
    assert sum(spent) <= next(clock)


class Clocked:
    spent, is_timed = 0.0, False

    @_timed.timed
    def outer(self) -> None:
        self.inner()
        self.inner()

    @_timed.timed
    def inner(self) -> None:
        pass

    @_timed.timed
    def fails(self) -> None:
        raise ZeroDivisionError


def test_a_call_inside_a_timed_call_counts_once_and_one_that_raises_counts_too(monkeypatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(_timed, "perf_counter", lambda: float(next(clock)))
    clocked = Clocked()
    clocked.outer()
    assert clocked.spent == 1.0
    with pytest.raises(ZeroDivisionError):
        clocked.fails()
    clocked.inner()
    assert clocked.spent == 3.0


@pytest.mark.parametrize("number", [1, 5, 6, 12])
def test_of_many_names_those_that_stand_there_and_those_that_are_counted_are_all(number: int) -> None:
    names = [f"layer{i}" for i in range(number)]
    text, _, more = listed(names).partition(" and ")
    named = text.split(", ")
    assert named == names[:5]
    assert len(named) + int(more.partition(" ")[0] or 0) == number


def test_names_stand_whole_in_the_summary_where_there_is_room_and_else_by_their_end() -> None:
    model = nn.ModuleDict({"head": nn.Linear(3, 3), "a" * 60: nn.Linear(3, 3)})
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.01), rules="observe") as watch:
        sum(part(torch.ones(4, 3)).square().mean() for part in model.values()).backward()
        watch.step()
        names = [line.split()[0] for line in watch.summary().splitlines() if ".weight" in line]
    assert names == ["head.weight", ("a" * 60 + ".weight")[-29:].rjust(32, ".")]
