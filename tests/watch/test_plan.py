"""The plan of a step: one for all ranks and all who ask, decided when the step begins."""

import random

import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.rules import Exploding, Expression, Rule, RuleBook
from gradwatch.treatments import ClipToLimit, SkipStep
from gradwatch.watch import _plan
from gradwatch.watch._local_norms import LocalNorms
from gradwatch.watch._measurement import Measurement
from gradwatch.watch._measurements import MEASUREMENTS
from gradwatch.watch._options import MeasureOptions, is_due
from gradwatch.watch._plan import reasons_to_wait
from gradwatch.watch._row_spread import RowSpread
from gradwatch.watch._updates import Updates

CADENCES = [(1, 50, 100, 50), (1, 3, 7, 5), (2, 50, None, 10), (1, None, None, None), (3, 1, 1, 1)]


def planner(**options: object) -> tuple[Watch, _plan.Planner]:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    watch = Watch(model, torch.optim.SGD(model.parameters(), lr=0.1), rules="observe", **options)
    return watch, watch.session.engine.planner


@pytest.mark.parametrize("cadences", CADENCES, ids=str)
@pytest.mark.parametrize("order", ["in turn", "leaps"])
def test_a_step_is_planned_by_its_cadences_whatever_was_asked_before(cadences: tuple[int, ...], order: str) -> None:
    names = ("every", "activations_every", "histograms_every", "updates_every")
    watch, plans = planner(**dict(zip(names, cadences, strict=True)))
    every, activations, histograms, updates = cadences
    steps = list(range(300))
    if order == "leaps":
        random.Random(0).shuffle(steps)
    with watch:
        for step in steps:
            plan = plans.at(step)
            due = is_due(step, activations), is_due(step, histograms), is_due(step, updates)
            has_updates = any(isinstance(s, Updates) for s in plan.statistics)
            assert (plan.modules, plan.histograms, has_updates) == due, step
            spreads = any(isinstance(s, RowSpread) for s in plan.statistics)
            assert (plan.measures, spreads) == (step % every == 0, step == 0), step
            assert plan.is_plain == (not (any(due) or spreads)), step


@pytest.mark.parametrize("order", ["in turn", "leaps"])
@pytest.mark.parametrize("others", [None, 7], ids=["alone", "among-others"])
def test_each_statistic_is_measured_at_its_own_steps(others: int | None, order: str) -> None:
    options = dict.fromkeys(("activations_every", "histograms_every", "updates_every"), others)
    watch, plans = planner(**options, noise_scale=True, fingerprints=True, recompute_every=30, local_norms=False)
    steps = list(range(300))
    if order == "leaps":
        random.Random(0).shuffle(steps)
    with watch:
        known = watch.session.engine.tables.statistics
        assert len(known) >= 4
        for step in steps:
            due = tuple(
                s for s in known if is_due(step, s.every) and type(s).__name__ not in ("RankSpread", "Replicas")
            )
            assert plans.at(step).statistics == due, step


@pytest.mark.parametrize("kind", MEASUREMENTS)
def test_what_a_measurement_gives_is_in_the_table_of_columns(kind: type[Measurement]) -> None:
    assert [column.name for column in kind.columns()] == list(kind.gives)
    assert kind.gives or kind is LocalNorms  # a number for each rank, of a family
    assert kind.part


def test_what_is_learnt_in_a_step_changes_the_plans_of_later_ones_alone() -> None:
    watch, plans = planner()
    with watch:
        before = plans.at(101)
        plans.look_closer(104)
        assert plans.at(101) is before
        assert [plans.at(step).modules for step in (102, 103, 104, 105)] == [True, True, True, False]


@pytest.mark.parametrize("is_late", [False, True])
def test_ranks_whose_numbers_come_late_all_look_closer_or_none(is_late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, plans = planner()
    with watch:
        monkeypatch.setattr(_plan, "world_size", lambda: 2)
        monkeypatch.setattr(_plan, "is_host", lambda device: not is_late)
        plans.look_closer(104)
        # What one rank has judged by now, another may not have: a layout of its own would let the others wait for ever.
        assert plans.at(103).modules == (not is_late)
        assert plans.at(150).modules
        assert not plans.at(150).is_plain


def test_an_asked_for_record_is_judged_with_numpy_as_gradwatch_has_it() -> None:
    import numpy as np

    model = nn.Linear(2, 1)
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.1), on_error="raise") as watch, np.errstate(all="raise"):
        for scale in (1.0, 1e-30, float("inf"), 1e30, 1.0):
            (model(torch.ones(1, 2)).sum() * scale).backward()
            outcome = watch.after_backward(1.0)
            assert outcome.record.global_norm == pytest.approx(scale * 3**0.5)
            watch.optimizers[0].zero_grad()
            watch.after_step()


@pytest.mark.parametrize(
    ("rule", "waits"),
    [
        pytest.param(Exploding(then=ClipToLimit()), False, id="limit"),
        pytest.param(Exploding(then=ClipToLimit(), for_steps=3), True, id="limit-several-steps"),
        pytest.param(Exploding(then=ClipToLimit(), treat_after=2), True, id="limit-later"),
        pytest.param(Expression("lr > 1", then=SkipStep()), True, id="no-limit"),
        pytest.param(Expression("lr > 1"), False, id="no-treatment"),
    ],
)
def test_a_rule_that_treats_waits_where_no_norm_alone_can_decide_for_it(rule: Rule, waits: bool) -> None:
    said = reasons_to_wait(RuleBook([rule]), (), MeasureOptions())
    assert bool(said) == waits
    assert rule.name in said or not waits
