# ruff: noqa: E501
"""Every rule of the catalogue on a table of small series: what it must flag, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gradwatch.records import SEVERITIES, StepRecord, TreatmentReport
from gradwatch.rules import RULES, Rule, RuleBook, RuleEngine

from .series import MODULES, make_index, make_record, norms, run

Records = Callable[[], list[StepRecord]]


def steady(num: int = 300, **given: Any) -> list[StepRecord]:
    """`num` records; a value that is a function is called with the step; None leaves it out."""
    records = []
    for s in range(num):
        values = {k: v(s) if callable(v) else v for k, v in given.items()}
        records.append(make_record(s, **{k: v for k, v in values.items() if v is not None}))
    return records


def every(cadence: int, value: Any) -> Any:
    return lambda s: (value(s) if callable(value) else value) if s % cadence == 0 else None


def noise(scale: float = 1.0, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return lambda s: scale * float(rng.normal())


def falling(s: int) -> float:
    return 2.0 * 0.98**s + 0.05


def modules(*values: float) -> dict[str, float]:
    return dict(zip(MODULES, values, strict=False))


def formulas(followed: str, *others: str, **given: float) -> list[StepRecord]:
    """Records whose loss is one formula, plus a penalty that changes slowly; the others are noise about it."""
    rng = np.random.default_rng(0)
    records = []
    for s in range(12):
        loss = float(1 + 0.3 * rng.normal())
        values = {followed: loss} | {name: loss + float(0.3 * rng.normal()) for name in others}
        records.append(make_record(s, loss=loss + 0.05 + 0.001 * s, **values, **given))
    return records


STUCK, GOOD = 2.3, falling
CREEPING = norms(1e-5, 1e-4, 5e-5)
jitter, grow = noise(0.2), noise(0.1, 1)
KINDS = {"shapes": {"target_row_sum_min": 1, "target_row_sum_max": 1, "target_min": 0, "target_max": 1}}
HEALTHY_NORMS = norms(1.0, 2.0, 3.0)
CLIP = (TreatmentReport(name="clip_by_global_norm", before=2, after=1),)
ONE_HOT = {"target_min": 0, "target_max": 1, "target_row_sum_min": 1, "target_row_sum_max": 1, "batch_size": 32}


def case(rule: str, records: Records, expected: bool, name: str, **settings: Any) -> Any:
    return pytest.param(rule, records, expected, settings, id=f"{rule}-{name}")


CASES = [
    case("non_finite", lambda: steady(3, loss=float("nan")), True, "loss"),
    case("non_finite", lambda: steady(3, grad_norm=norms(1, float("inf"))), True, "gradient"),
    case("non_finite", lambda: steady(3, output_nonfinite=modules(0, 2)), True, "activation"),
    case("non_finite", lambda: steady(3, global_norm=float("inf")), True, "global-norm"),
    case("non_finite", lambda: steady(3, loss=1.0, grad_norm=HEALTHY_NORMS), False, "finite"),
    case("non_finite", lambda: steady(4, amp_overflow=1, grad_scale=2.0**16, grad_norm=norms(float("inf"))), False, "amp"),
    case("non_finite", lambda: steady(7, amp_overflow=1, grad_scale=2.0, grad_norm=norms(float("nan"))), True, "amp-long"),
    case("non_finite", lambda: steady(2, amp_overflow=1, grad_scale=1.0, grad_norm=norms(float("nan"))), True, "amp-floor"),
    case("exploding", lambda: steady(60, global_norm=lambda s: np.exp(jitter(s)) * (1000 if s == 50 else 1)), True, "x1000"),
    case("exploding", lambda: steady(60, global_norm=lambda s: np.exp(jitter(s)) * (4 if s == 50 else 1)), False, "x4"),
    case("exploding", lambda: steady(60, global_norm=lambda s: np.exp(jitter(s)) * (6 if s > 57 else 1)), True, "x6-twice", min_samples=10, window=50),
    case("exploding", lambda: steady(200, global_norm=lambda s: 100 * 0.9**s + (0.5 if s == 150 else 0)), False, "late-and-small"),
    case("exploding", lambda: steady(60, grad_norm=lambda s: norms(1, 1000 if s == 50 else 1, 1)), False, "other-path", paths="a.*"),
    case("exploding", lambda: steady(60, grad_norm=lambda s: norms(1, 1000 if s == 50 else 1, 1)), True, "own-path", paths="b.*"),
    case("vanishing", lambda: steady(loss=STUCK, grad_norm=norms(1e-6, 1e-3, 1)), True, "deep"),
    case("vanishing", lambda: steady(loss=GOOD, grad_norm=norms(1e-6, 1e-3, 1)), False, "improving"),
    case("vanishing", lambda: steady(grad_norm=norms(1e-6, 1e-3, 1)), False, "no-loss"),
    case("vanishing", lambda: steady(loss=STUCK, grad_norm=norms(1e-6, 1e-6, 1e-6)), False, "all-small"),
    case("dead", lambda: steady(60, loss=STUCK, grad_norm=norms(0, 0, 1)), True, "trunk"),
    case("dead", lambda: steady(60, grad_norm=norms(0, 1, 1)), True, "trunk-no-loss"),
    case("dead", lambda: steady(60, loss=STUCK, grad_norm={"c.weight": 1.0}), True, "detached-trunk"),
    case("dead", lambda: steady(60, loss=STUCK, grad_norm=norms(1, 0, 1)), False, "unused-branch"),
    case("dead", lambda: steady(60, loss=GOOD, grad_norm=norms(0, 0, 1)), False, "improving"),
    case("dead", lambda: steady(60, loss=0.0, grad_norm=norms(0, 0, 0)), False, "solved"),
    case("not_updating", lambda: steady(120, update_norm=every(50, norms(0, 1, 1)), grad_norm=HEALTHY_NORMS), True, "zero"),
    case("not_updating", lambda: steady(220, update_norm=lambda s: norms(float(s < 9), 1, 1), grad_norm=HEALTHY_NORMS), False, "moved-once"),
    case("not_updating", lambda: steady(60, update_norm=norms(0, 0, 0), grad_norm=HEALTHY_NORMS, lr=0.0), False, "lr-zero"),
    case("not_updating", lambda: steady(60, update_norm=norms(0, 0, 0), grad_norm=norms(0, 0, 0)), False, "no-gradient"),
    case("not_updating", lambda: [make_record(s, make_index(in_optimizer=[True, False, True])) for s in range(25)], True, "left-out"),
    case("not_updating", lambda: [make_record(s, make_index(trainable=[False] * 3, in_optimizer=[True] * 3), num_trainable=0) for s in range(25)], True, "nothing"),
    case("not_updating", lambda: [make_record(s, make_index(trainable=[False, True, True])) for s in range(25)], False, "frozen"),
    case("update_too_large", lambda: steady(loss=STUCK, update_ratio=every(50, norms(0.5, 0.1, 0.1))), True, "half"),
    case("update_too_large", lambda: steady(loss=GOOD, update_ratio=every(50, norms(0.5, 0.1, 0.1))), False, "improving"),
    case("update_too_large", lambda: steady(60, loss=STUCK, update_ratio=every(10, norms(9, 9, 9))), False, "first-steps"),
    case("update_too_small", lambda: steady(loss=STUCK, update_ratio=every(50, norms(1e-7, 1e-3))), True, "tiny"),
    case("update_too_small", lambda: steady(loss=GOOD, update_ratio=every(50, norms(1e-7, 1e-3))), False, "improving"),
    case("update_too_small", lambda: steady(loss=STUCK, lr=0.0, update_ratio=every(50, norms(0, 0))), False, "lr-zero"),
    case("not_learning", lambda: steady(301, loss=lambda s: 2.3 + 0.02 * grow(s)), True, "flat"),
    case("not_learning", lambda: steady(150, loss=lambda s: 2.3 + 0.02 * grow(s)), True, "short-run"),
    case("not_learning", lambda: steady(301, loss=GOOD), False, "falls"),
    case("not_learning", lambda: steady(301, loss=lambda s: -1.0 - s / 100), False, "negative"),
    case("not_learning", lambda: steady(301, loss=lambda s: 2 * 0.97**s + 5 * (s % 2)), False, "outlier-batches"),
    case("constant_output", lambda: steady(60, loss=STUCK, batch_size=8, output_batch_variance=0.0), True, "constant"),
    case("constant_output", lambda: steady(60, loss=STUCK, batch_size=1, output_batch_variance=0.0), False, "batch-of-one"),
    case("constant_output", lambda: steady(60, loss=0.0, batch_size=8, output_batch_variance=0.0), False, "solved"),
    case("constant_output", lambda: steady(60, loss=STUCK, batch_size=8, output_batch_variance=1e-3), False, "varies"),
    case("loss_spike", lambda: steady(120, loss=lambda s: 2 + 0.02 * grow(s) + (3 if s in (100, 103, 105) else 0)), True, "three-of-ten"),
    case("loss_spike", lambda: steady(120, loss=lambda s: 2 + 0.02 * grow(s) + (3 if s == 100 else 0)), False, "one"),
    case("loss_spike", lambda: steady(120, loss=lambda s: 2 + 0.02 * grow(s) + (3 if s == 100 else 0)), True, "one-if-asked", spikes=1),
    case("loss_spike", lambda: steady(400, loss=lambda s: 0.1 + (3 if s % 3 == 0 else 0)), False, "outlier-batches"),
    case("diverging", lambda: steady(100, loss=lambda s: 1.0 if s < 40 else 1.05 ** (s - 40)), True, "up"),
    case("diverging", lambda: steady(200, loss=lambda s: -2.3 - s / 2, **KINDS["shapes"]), True, "wrong-sign"),
    case("diverging", lambda: steady(200, loss=lambda s: -2.3 - s / 2), False, "unbounded-below-by-right"),
    case("diverging", lambda: steady(200, loss=lambda s: 1.0 + (20 if s % 40 == 5 else 0)), False, "outliers"),
    case("gradient_growth", lambda: steady(loss=STUCK, global_norm=lambda s: np.exp(s / 60)), True, "grows"),
    case("gradient_growth", lambda: steady(loss=GOOD, global_norm=lambda s: np.exp(s / 60)), False, "improving"),
    case("gradient_growth", lambda: steady(loss=STUCK, global_norm=lambda s: 1 + s / 300), False, "little"),
    case("dead_units", lambda: steady(loss=STUCK, silent_fraction=every(50, modules(0.6, 0.1))), True, "many"),
    case("dead_units", lambda: steady(loss=GOOD, silent_fraction=every(50, modules(0.95, 0.1))), False, "improving"),
    case("saturated", lambda: steady(loss=STUCK, saturated_fraction=every(50, modules(0.8))), True, "most"),
    case("saturated", lambda: steady(loss=GOOD, saturated_fraction=every(50, modules(0.8))), False, "improving"),
    case("act_scale", lambda: steady(120, output_std=every(50, modules(1e-5, 1, 1e4))), True, "both-ends"),
    case("act_scale", lambda: steady(120, output_std=every(50, modules(0, 1, 1))), False, "zero-is-no-scale"),
    case("bad_initial_loss", lambda: steady(3, loss=8.0, expected_initial_loss=2.3), True, "high"),
    case("bad_initial_loss", lambda: steady(3, loss=2.5, expected_initial_loss=2.3), False, "ln-k"),
    case("symmetric_units", lambda: steady(1, row_spread=norms(0, 0, 1), param_norm=norms(1, 1, 1)), True, "two-of-three"),
    case("symmetric_units", lambda: steady(1, row_spread=norms(0, 1, 1), param_norm=norms(1, 1, 1)), False, "one-is-mended"),
    case("symmetric_units", lambda: steady(1, row_spread=norms(0, 0, 1), param_norm=norms(0, 0, 1)), False, "zero-on-purpose"),
    case("output_range", lambda: steady(20, output_min=0.01, output_max=0.99, target_min=-2, target_max=2), True, "sigmoid"),
    case("output_range", lambda: steady(20, output_min=0.0, output_max=3.0, target_min=-2, target_max=2), True, "relu"),
    case("output_range", lambda: steady(20, output_min=-0.4, output_max=0.5, target_min=-2, target_max=2), False, "linear"),
    case("output_range", lambda: steady(200, output_min=0.0, output_max=1.0, target_min=100, target_max=400), True, "far-off"),
    case("output_range", lambda: steady(200, output_min=-9.0, output_max=-2.0, target_min=0, target_max=1), False, "logits"),
    case("output_range", lambda: steady(20, output_min=0.0, output_max=0.9, target_min=0, target_max=9, target_is_integer=1), False, "class-indices"),
    case("target_semantics", lambda: steady(3, output_min=0, target_min=0, shape_mismatch=1), True, "broadcast"),
    case("target_semantics", lambda: steady(3, output_min=0, output_row_sum_min=1, output_row_sum_max=1, target_min=0, target_row_sum_min=0, target_row_sum_max=3), True, "softmax-for-many-labels"),
    case("target_semantics", lambda: steady(3, output_min=0, output_row_sum_min=1, output_row_sum_max=1, **ONE_HOT), False, "softmax-for-one"),
    case("unnormalised_input", lambda: steady(5, input_mean=130.0, input_std=60.0), True, "bytes"),
    case("unnormalised_input", lambda: steady(5, input_mean=0.1, input_std=1.0), False, "normal"),
    case("unnormalised_input", lambda: [make_record(s, make_index(types={"a": "BatchNorm1d"}), input_mean=130.0, input_std=60.0) for s in range(5)], False, "normalised-inside"),
    case("unnormalised_input", lambda: steady(5, input_mean=0.001, input_std=0.001, input_absmax=0.004), True, "tiny"),
    case("unnormalised_input", lambda: steady(5, input_mean=0.0, input_std=0.0, input_absmax=0.0), False, "empty"),
    case("constant_labels", lambda: steady(10, target_min=3, target_max=3, batch_size=32), True, "one-value"),
    case("constant_labels", lambda: steady(10, target_entropy=0.0, **ONE_HOT), True, "one-class"),
    case("constant_labels", lambda: steady(10, target_variance=0.0, **ONE_HOT), True, "one-row"),
    case("constant_labels", lambda: steady(6, target_min=0, target_max=0, batch_size=32), False, "rare-class-so-far"),
    case("constant_labels", lambda: steady(5, target_min=3, target_max=3, batch_size=2), False, "small-batch"),
    case("blown_up", lambda: steady(30, loss=lambda s: 2.3 if s == 0 else 100.0 * 0.9**s, batch_size=32), True, "x40"),
    case("blown_up", lambda: steady(30, loss=lambda s: 2.3 if s != 3 else 100.0, batch_size=32), False, "once"),
    case("blown_up", lambda: steady(30, loss=lambda s: 2.3 if s == 0 else 100.0 * 0.9**s, batch_size=1), False, "batch-of-one"),
    case("blown_up", lambda: steady(30, loss=lambda s: 0.1 if s < 25 else 100.0, batch_size=32), False, "later"),
    case("blown_up", lambda: steady(30, loss=lambda s: -2.3 + s, batch_size=32), False, "negative"),
    case("crawling", lambda: steady(300, loss=lambda s: 2.3 - s / 500, update_ratio=every(50, CREEPING)), True, "creeps"),
    case("crawling", lambda: steady(300, loss=lambda s: 2.3 - s / 500, update_ratio=every(50, norms(1e-5, 1e-3, 1e-4))), False, "one-weight-moves"),
    case("crawling", lambda: steady(300, loss=STUCK, update_ratio=every(50, CREEPING)), False, "converged"),
    case("crawling", lambda: steady(300, loss=lambda s: 2.3 * 0.99**s, update_ratio=every(50, CREEPING)), False, "learns"),
    case("crawling", lambda: steady(300, loss=lambda s: 2.3 - s / 500, lr=lambda s: 1e-3 if s < 90 else 1e-5, update_ratio=every(50, CREEPING)), False, "decayed"),
    case("mistaken_loss", lambda: formulas("squared_error_of_pairs", "squared_error"), True, "broadcast"),
    case("mistaken_loss", lambda: formulas("squared_error", "squared_error_of_pairs"), False, "squared-error"),
    case("mistaken_loss", lambda: formulas("cross_entropy_over_batch", "cross_entropy"), True, "over-the-batch"),
    case("mistaken_loss", lambda: formulas("cross_entropy_twice", "cross_entropy"), True, "twice"),
    case("mistaken_loss", lambda: formulas("cross_entropy", "cross_entropy_over_batch", "cross_entropy_twice"), False, "right"),
    case("mistaken_loss", lambda: formulas("cross_entropy", "cross_entropy_of_probabilities", output_min=0, output_row_sum_min=1, output_row_sum_max=1), True, "probabilities-as-logits"),
    case("mistaken_loss", lambda: formulas("cross_entropy", "cross_entropy_of_probabilities"), False, "logits"),
    case("mistaken_loss", lambda: formulas("something_else", "squared_error", "squared_error_of_pairs"), False, "another-loss"),
    case("overfit", lambda: steady(100, loss=GOOD, val_loss=every(10, lambda s: 1.0 if s < 20 else 2.0)), True, "rises"),
    case("overfit", lambda: steady(100, loss=GOOD, val_loss=every(10, lambda s: 2.0 - s / 100)), False, "falls"),
    case("val_not_learning", lambda: steady(100, loss=GOOD, val_loss=every(10, 2.3)), True, "stays"),
    case("val_not_learning", lambda: steady(400, loss=lambda s: 2.3 - s / 1000, val_loss=every(20, 2.3)), True, "untrained-level"),
    case("val_not_learning", lambda: steady(400, loss=lambda s: max(0.2, 2.3 - s / 20), val_loss=every(20, 0.3)), False, "learned-at-once"),
    case("val_not_learning", lambda: steady(300, loss=lambda s: 0.4 * 0.98**s + 0.04, squared_error=lambda s: 0.4 * 0.98**s + 0.04, target_variance=0.08, val_loss=every(10, 0.1)), True, "worse-than-a-constant"),
    case("val_not_learning", lambda: steady(300, loss=lambda s: 0.4 * 0.98**s + 0.04, squared_error=lambda s: 0.4 * 0.98**s + 0.04, target_variance=0.08, val_loss=every(10, 0.06)), False, "better-than-a-constant"),
    case("val_not_learning", lambda: steady(100, loss=STUCK, val_loss=every(10, 2.3)), False, "neither-learns"),
    case("train_eval_mismatch", lambda: steady(100, loss=GOOD, train_eval_loss=every(10, 5.0)), True, "worse"),
    case("train_eval_mismatch", lambda: steady(100, loss=GOOD, train_eval_loss=every(10, falling)), False, "same"),
    case("train_eval_mismatch", lambda: steady(100, loss=GOOD, train_eval_loss=every(10, 5.0), batch_size=1), False, "batch-of-one"),
    case("undertrained", lambda: steady(200, loss=lambda s: 2 - s / 400), True, "still-falling"),
    case("undertrained", lambda: steady(900, loss=falling), False, "done"),
    case("clip_too_often", lambda: steady(120, treatments=CLIP), True, "always"),
    case("clip_too_often", lambda: steady(120, treatments=lambda s: CLIP if s % 5 == 0 else ()), False, "now-and-then"),
    case("amp_overflow", lambda: steady(3, amp_overflow=1, grad_scale=1.0), True, "floor"),
    case("amp_overflow", lambda: steady(300, amp_overflow=lambda s: s % 10 == 0, grad_scale=1024.0), True, "often"),
    case("amp_overflow", lambda: steady(300, amp_overflow=lambda s: s < 6, grad_scale=1024.0), False, "first-steps"),
    case("grad_not_reset", lambda: steady(10, grads_kept=1), True, "kept"),
    case("grad_not_reset", lambda: steady(10, grads_kept=0), False, "reset"),
    case("grad_conflict", lambda: steady(120, **{"task_cos/seg/depth": -0.2}), True, "always"),
    case("grad_conflict", lambda: steady(120, **{"task_cos/seg/depth": 0.2}), False, "agree"),
    case("stalled", lambda: steady(2, seconds=2000.0), True, "half-an-hour"),
    case("stalled", lambda: steady(2, seconds=2.0), False, "seconds"),
    case("rank_divergence", lambda: steady(2, rank_spread=1e-3), True, "differ"),
    case("rank_divergence", lambda: steady(2, rank_spread=0.0), False, "equal"),
    case("dead_signal", lambda: steady(250, loss=0.0, global_norm=lambda s: 1 + 0.1 * (s % 7)), True, "filtered-nan"),
    case("dead_signal", lambda: steady(250, loss=lambda s: 2 + 0.1 * (s % 7), global_norm=0.0), True, "norm-zero"),
    case("dead_signal", lambda: steady(400, loss=lambda s: max(0.0, 1 - s / 100), global_norm=lambda s: max(0.0, 1 - s / 100)), False, "solved"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "records", "expected", "settings"), CASES)
def test_rule_flags_what_it_must_and_nothing_else(rule: str, records: Records, expected: bool, settings: Any) -> None:
    found = run(RULES[rule](**settings), records(), finish=True)
    assert bool(found) is expected, found
    for incident in found:
        assert incident.rule == rule
        assert incident.message
        assert "{" not in incident.message


def test_every_rule_of_the_catalogue_has_cases_both_ways() -> None:
    told = {(c.values[0], c.values[2]) for c in CASES}
    for name in set(RULES) - {"expression"}:
        assert {(name, True), (name, False)} <= told, name


@pytest.mark.parametrize("cls", [pytest.param(c, id=n) for n, c in RULES.items() if n != "expression"])
def test_every_rule_says_what_to_do_and_where_it_stands(cls: type[Rule]) -> None:
    rule = cls()
    assert len(rule.advice) > 40
    assert rule.needs
    assert rule.severity in SEVERITIES
    assert cls.__doc__
    assert len(cls.__doc__) > 80


@pytest.mark.parametrize("cls", [pytest.param(c, id=n) for n, c in RULES.items() if n != "expression"])
def test_no_rule_speaks_or_fails_on_records_that_hold_nothing(cls: type[Rule]) -> None:
    engine = RuleEngine(RuleBook([cls()]), on_error="raise")
    empty = make_index((), ())
    for s in range(320):
        engine.judge(make_record(s, empty) if s % 2 else make_record(s))
    engine.finish(320)
    assert engine.incidents == []


def test_non_finite_names_the_module_where_it_was_born() -> None:
    index = make_index(
        ("enc.a.weight", "enc.b.weight", "head.weight"),
        ("enc", "enc.a", "enc.b", "head"),
        depth={"enc": 0, "enc.a": 0, "enc.b": 1, "head": 2},
    )
    record = make_record(
        0,
        index,
        loss=float("nan"),
        grad_norm={p: float("nan") for p in index.paths[:3]},
        output_nonfinite={"enc": 4, "enc.a": 0, "enc.b": 4, "head": 2},
        input_nonfinite={"enc": 0, "enc.a": 0, "enc.b": 0, "head": 4},
    )
    (incident,) = run(RULES["non_finite"](), [record])
    assert incident.first_path == "enc.b"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({"grad_norm": norms(*[float("nan")] * 3)}, "a.weight", id="all-bad-first-parameter"),
        pytest.param(
            {"grad_norm": norms(float("nan"), float("nan"), 1.0)}, "b.weight", id="some-bad-nearest-to-the-loss"
        ),
    ],
)
def test_non_finite_gradients_alone_name_a_parameter(given: Any, expected: str) -> None:
    (incident,) = run(RULES["non_finite"](), [make_record(0, **given)])
    assert incident.first_path == expected


def test_exploding_names_the_layers_that_left_their_level_the_last_one_first() -> None:
    records = steady(60, grad_norm=lambda s: norms(1, *((1000, 1000) if s == 50 else (1, 1))))
    (incident,) = run(RULES["exploding"](), records)
    assert (incident.first_step, incident.first_path) == (50, "c.weight")
    assert incident.paths == ("c.weight", "b.weight")
