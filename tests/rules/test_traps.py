"""Ways in which monitors of training have failed before: one test each, named after what went wrong."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradwatch.rules
from gradwatch import load_rules
from gradwatch.records import StepRecord
from gradwatch.rules import (
    AmpOverflow,
    ConstantOutput,
    Dead,
    DeadSignal,
    DeadUnits,
    Diverging,
    Exploding,
    Expression,
    LossSpike,
    NonFinite,
    NotLearning,
    NotUpdating,
    RuleBook,
    RuleEngine,
    SymmetricUnits,
    UpdateTooLarge,
    UpdateTooSmall,
    Vanishing,
)

from .series import MODULES, make_index, make_record, norms, run

RNG = np.random.default_rng(0)
DEFAULT = load_rules("default")


def healthy(num: int, **given: Any) -> list[StepRecord]:
    """A run that goes well; what is given (values, or functions of the step) stands in its records."""
    rng = np.random.default_rng(1)
    records = []
    for s in range(num):
        g = np.exp(0.2 * rng.normal(size=3))
        values: dict[str, Any] = {"loss": 2.3 * 0.99**s + 0.1 + 0.02 * rng.normal(), "grad_norm": norms(*g)}
        values |= {k: v(s) if callable(v) else v for k, v in given.items()}
        records.append(make_record(s, **{k: v for k, v in values.items() if v is not None}))
    return records


def alarms(records: list[StepRecord]) -> list[str]:
    return [str(i) for i in run(DEFAULT, records, finish=True) if i.severity != "info"]


def test_01_warm_up_cold_windows_and_a_learning_rate_of_zero_at_the_start() -> None:
    records = healthy(
        150,
        lr=lambda s: 1e-3 * min(1, s / 100),
        update_norm=lambda s: norms(*[float(s > 0)] * 3) if s % 50 == 0 else None,
        update_ratio=lambda s: norms(*[1e-9 * (s > 0)] * 3) if s % 50 == 0 else None,
        global_norm=lambda s: 100 * math.exp(-s / 5) + 1,
    )
    assert alarms(records) == []


def test_02_a_spike_never_enters_its_own_baseline() -> None:
    rule = Exploding()
    state = rule.init()
    for s in range(100):
        _, state = rule.judge(make_record(s, global_norm=1 + 0.1 * (s % 3)), state)
    before = rule.limit(state)
    for s in range(100, 130):
        findings, state = rule.judge(make_record(s, global_norm=1000.0), state)
        assert len(findings) == 1
    assert max(state["window"]) < math.log(2)
    assert rule.limit(state) == before


def test_03_one_nan_in_four_hundred_steps_changes_nothing_after_it() -> None:
    clean = healthy(400)
    poisoned = list(clean)
    poisoned[200] = make_record(200, loss=float("nan"), grad_norm=norms(*[float("nan")] * 3))
    book = RuleBook([r for r in DEFAULT if r.rule_name != "non_finite"])
    with_nan, without = RuleEngine(book, on_error="raise"), RuleEngine(book, on_error="raise")
    for s, (a, b) in enumerate(zip(poisoned, clean, strict=True)):
        with_nan.judge(a)
        if s != 200:
            without.judge(b)
    assert with_nan.limits() == pytest.approx(without.limits())
    assert with_nan.incidents == without.incidents == []
    (incident,) = run(NonFinite(), poisoned)
    assert (incident.first_step, incident.count) == (200, 1)


def test_04_rules_multiply_nothing_by_zero_to_leave_it_out() -> None:
    """Masking is choosing: a path that is nan and not looked at changes no other path's judgement."""
    records = [make_record(s, loss=2.3, grad_norm=norms(float("nan"), 1e-6, 1.0)) for s in range(200)]
    (incident,) = run(Vanishing(paths=["b.*", "c.*"]), records)
    assert incident.paths == ("b.weight",)


def test_05_a_constant_signal_has_no_deviation_to_measure_with() -> None:
    flat = [make_record(s, loss=1.0 + (1e-6 if s == 90 else 0), global_norm=1.0 + 1e-6 * (s == 90)) for s in range(120)]
    assert not run([Exploding(), LossSpike(spikes=1)], flat)


def test_06_heavy_tails_of_small_batches_are_no_spikes() -> None:
    rng = np.random.default_rng(3)
    tails = rng.standard_t(3, size=1500)
    records = [make_record(s, loss=1 + 0.3 * abs(t), global_norm=float(np.exp(0.4 * t))) for s, t in enumerate(tails)]
    assert not run([LossSpike(), Diverging()], records)
    assert len(run(Exploding(cooldown=0, keep_firing_for=0), records)) <= 1


def test_07_a_converged_model_has_small_gradients_and_updates() -> None:
    records = healthy(
        600,
        loss=lambda s: 2.3 * 0.97**s,
        grad_norm=lambda s: norms(*(np.array([1e-5, 1e-2, 1]) * 0.97**s)),
        update_ratio=lambda s: norms(*[0.1 * 0.97**s] * 3) if s % 50 == 0 else None,
        update_norm=lambda s: norms(*[float(s < 400)] * 3) if s % 50 == 0 else None,
    )
    assert alarms(records) == []


def test_08_sparse_rows_and_experts_without_a_token_are_healthy() -> None:
    names = ("gate.weight", "experts.0.weight", "experts.1.weight", "experts.2.weight", "head.weight")
    index = make_index(names, ())
    alive = {p: 1.0 for p in names if "2" not in p}
    for idle in (alive, alive | {"experts.2.weight": 0.0}):
        records = [make_record(s, index, loss=2.3 * 0.99**s + 0.1, grad_norm=idle) for s in range(300)]
        records += [make_record(s, index, loss=0.2, grad_norm=idle) for s in range(300, 600)]
        assert alarms(records) == []


def test_09_frozen_parameters_are_not_looked_at() -> None:
    index = make_index(trainable=[False, True, True], in_optimizer=[True, True, True])
    grads = {"b.weight": 1.0, "c.weight": 2.0}
    updates = {"a.weight": 0.0, "b.weight": 1.0, "c.weight": 1.0}
    records = [
        make_record(s, index, loss=2.3, grad_norm=grads, update_norm=updates, update_ratio=updates) for s in range(280)
    ]
    rules = [Dead(), NotUpdating(), UpdateTooSmall(), Vanishing()]
    assert not run(rules, records)


def test_10_a_bias_before_a_normalisation_has_gradient_zero() -> None:
    index = make_index(("a.weight", "a.bias", "b.weight"), (), shapes={"a.bias": (10,)})
    grads = {"a.weight": 1.0, "a.bias": 0.0, "b.weight": 1.0}
    records = [make_record(s, index, loss=2.3, grad_norm=grads, update_ratio=grads) for s in range(280)]
    assert not run([Dead(), Vanishing(), UpdateTooSmall()], records)


def test_11_weights_that_begin_at_zero() -> None:
    at_start = make_record(
        0, loss=2.3, grad_norm=norms(0, 1, 1), row_spread=norms(0.3, 0, 0), param_norm=norms(1, 0, 0)
    )
    records = [at_start, *healthy(200, update_ratio=lambda s: norms(1e8, 0.01, 0.01) if s < 3 else norms(0.01))[1:]]
    assert not run([SymmetricUnits(), Dead(), UpdateTooLarge(), NotUpdating()], records)


def test_12_a_batch_of_one_has_no_variance_and_a_jumpy_loss() -> None:
    rng = np.random.default_rng(5)
    losses = [float(abs(rng.normal()) * 2 * 0.997**s) for s in range(900)]
    records = healthy(900, loss=lambda s: losses[s], batch_size=1, output_batch_variance=0.0)
    assert alarms(records) == []


def test_13_narrow_layers_and_dropout_zeros_are_not_dead_units() -> None:
    narrow = dict(zip(MODULES, (0.8, 0.6, 0.4), strict=True))
    zeros = dict(zip(MODULES, (0.95, 0.9, 0.7), strict=True))
    given = {"silent_fraction": lambda s: narrow if s % 50 == 0 else None, "output_zero_fraction": lambda s: zeros}
    assert alarms(healthy(400, **given)) == []
    stuck = healthy(400, loss=2.3, **given)
    assert run(DeadUnits(), stuck)[0].paths == ("a", "b")


def test_14_accumulated_gradients_are_judged_once_a_step() -> None:
    """A short last window gives gradients of half the size, or of less: no alarm."""
    assert alarms(healthy(400, global_norm=lambda s: 0.25 if s % 50 == 49 else 1.0)) == []


def test_15_overflowing_steps_of_a_loss_scaler_are_its_way_of_working() -> None:
    bad = norms(*[float("inf")] * 3)

    def records(overflows: Any, scale: float = 2.0**16) -> list[StepRecord]:
        return healthy(
            400,
            grad_norm=lambda s: bad if overflows(s) else norms(1, 1, 1),
            amp_overflow=overflows,
            grad_scale=scale,
            update_norm=lambda s: norms(*[0.0 if overflows(s) else 1.0] * 3),
        )

    assert alarms(records(lambda s: s < 4 or s == 300)) == []
    assert {i.rule for i in run([NonFinite(), AmpOverflow()], records(lambda s: s % 8 == 0))} == {"amp_overflow"}


def test_16_the_decision_is_a_function_of_the_record_alone() -> None:
    """Ranks that hold the same record decide alike: no rule draws random numbers or looks at a clock."""
    for file in Path(gradwatch.rules.__file__).parent.rglob("*.py"):
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        assert not imported & {"random", "time", "datetime", "secrets", "torch"}, file


def test_17_judging_changes_no_record() -> None:
    records = healthy(150)
    before = [r.columns["grad_norm"].copy() for r in records]
    run(DEFAULT, records)
    for record, kept in zip(records, before, strict=True):
        np.testing.assert_array_equal(record.columns["grad_norm"], kept)


@pytest.mark.parametrize("start", [-1.0, 0.5, 40.0])
def test_18_losses_below_zero_and_through_zero_are_judged_by_differences(start: float) -> None:
    rng = np.random.default_rng(7)
    losses = [start - 0.01 * s + 0.1 * rng.normal() for s in range(700)]
    assert alarms(healthy(700, loss=lambda s: losses[s])) == []
    flat = healthy(400, loss=lambda s: start + 1e-3 * losses[s] * 0)
    assert "not_learning" in {i.rule for i in run([NotLearning()], flat)}


def test_19_a_jump_that_was_announced_is_silent_and_becomes_the_level() -> None:
    engine = RuleEngine(RuleBook([Exploding(), LossSpike()]), on_error="raise")
    for s, record in enumerate(healthy(500)):
        if s == 200:
            engine.annotate("new data", silence=100)
        factor = 50.0 if s >= 200 else 1.0
        engine.judge(make_record(s, loss=record.loss * factor, global_norm=record.global_norm * factor))
    assert engine.incidents == []


def test_20_sums_instead_of_means_change_no_verdict() -> None:
    records = healthy(400, output_min=-1.0)
    scaled = [
        make_record(r.step, loss=r.loss * 1e4, grad_norm=norms(*(r.columns["grad_norm"][:3] * 1e4))) for r in records
    ]
    assert alarms(records) == alarms(scaled) == []
    stuck = [make_record(s, loss=2.3e4, grad_norm=norms(1e-3, 1, 1e4)) for s in range(250)]
    assert {i.rule for i in run([Vanishing()], stuck)} == {"vanishing"}


def test_21_a_faults_incident_does_not_hang_on_the_seed() -> None:
    found = set()
    for seed in range(5):
        rng = np.random.default_rng(seed)
        series = [make_record(s, loss=2.3 + 0.05 * rng.normal(), global_norm=1.0) for s in range(301)]
        found.add(bool(run(NotLearning(), series)))
    assert found == {True}


def test_22_no_rule_knows_the_name_of_a_program() -> None:
    for rule in DEFAULT:
        assert rule.paths == ("*",), rule.name


def test_23_what_is_healthy_raises_no_alarm_at_all() -> None:
    """A detection rate is worth nothing without its false alarms: the same rules, a run that goes well."""
    assert alarms(healthy(1200)) == []


def test_24_a_signal_that_is_constant_is_itself_an_alert() -> None:
    hidden = [make_record(s, loss=0.0, global_norm=1 + 0.1 * (s % 5)) for s in range(250)]
    zero = [make_record(s, loss=2 + 0.1 * (s % 5), global_norm=0.0) for s in range(250)]
    assert run(DeadSignal(), hidden)[0].message.startswith("the loss is 0")
    assert run(DeadSignal(), zero)[0].message.startswith("the gradient norm is 0")


def test_25_any_and_all_are_said_and_not_implied() -> None:
    record = make_record(0, grad_norm=norms(1, 1, 0))
    told = {e: bool(run(Expression(e), [record])) for e in ("any_over(grad_norm == 0)", "all_over(grad_norm == 0)")}
    assert list(told.values()) == [True, False]
    assert bool(run(Expression("share_over(grad_norm == 0) > 0.5"), [record])) is False


def test_26_one_nan_is_one_incident_and_not_two_hundred() -> None:
    names = [f"l{i}.weight" for i in range(200)]
    index = make_index(names, ())
    good, bad = dict.fromkeys(names, 1.0), dict.fromkeys(names, float("nan"))
    records = [
        make_record(s, index, loss=2.3 if s != 60 else float("nan"), grad_norm=bad if s == 60 else good)
        for s in range(90)
    ]
    (incident,) = run(DEFAULT, records)
    assert (incident.rule, len(incident.paths), incident.first_path) == ("non_finite", 200, "l0.weight")


def test_27_a_restart_does_not_blind_the_windows() -> None:
    engine = RuleEngine(RuleBook([Exploding()]))
    for s in range(100):
        engine.judge(make_record(s, global_norm=1 + 0.1 * (s % 3)))
    resumed = RuleEngine(RuleBook([Exploding()]))
    resumed.load_state_dict(engine.state_dict())
    assert [i.first_step for i in resumed.judge(make_record(100, global_norm=1000.0)).opened] == [100]


def test_28_a_parameter_that_is_shared_stands_once_in_the_index_and_once_in_an_incident() -> None:
    records = [make_record(s, loss=2.3, output_batch_variance=0.0, batch_size=4) for s in range(60)]
    (incident,) = run(ConstantOutput(), records)
    assert incident.paths == ()
    (incident,) = run(Expression("grad_norm > 0"), [make_record(s, grad_norm=norms(1, 1, 1)) for s in range(9)])
    assert sorted(incident.paths) == sorted(set(incident.paths)) == ["a.weight", "b.weight", "c.weight"]
