# ruff: noqa: E501
"""Every rule of the catalogue on a table of small series: what it must flag, and what it must leave alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradwatch.records import SEVERITIES, StepRecord, TreatmentReport
from gradwatch.rules import RULES, Rule, RuleBook, RuleEngine
from gradwatch.treatments import ClipToLimit
from gradwatch.watch._account import NO_BACKWARD, STEPS_INSIDE

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


def rising(s: int) -> float:
    return 2.3 + s / 1000


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


def decayed(decay: float, gradient: float) -> list[StepRecord]:
    """Weights that shrink while the loss does not fall: pulled by an L2 decay beside a gradient of this size."""
    shrinks = every(50, lambda s: norms(*[10 * 0.99**s] * 3))
    moves = every(50, norms(1e-3, 1e-3, 1e-3))
    return steady(300, loss=2.3, weight_decay=decay, decay_is_decoupled=0.0, param_norm=shrinks, update_norm=moves, grad_norm=norms(*[gradient] * 3))  # fmt: skip


def guessing(loss: Any, num: int) -> list[StepRecord]:
    return steady(num, loss=loss, cross_entropy=every(20, loss), baseline_loss=every(20, 2.3), num_samples=64)


def tokens(**given: float) -> list[StepRecord]:
    return steady(4, loss=2.3, **given)


def cut(*paths: str, ran: Any = None, until: int = 0) -> list[StepRecord]:
    """Records of a network in which these weights, or all but them until a step, get no gradient."""
    parameters = (
        "body.a.weight",
        "body.b.weight",
        "router.weight",
        "teacher.a.weight",
        "teacher.b.weight",
        "head.weight",
    )
    owners = tuple(p.rpartition(".")[0] for p in parameters)
    index = make_index(parameters, owners)
    gives = dict.fromkeys(owners if ran is None else ran, 1.0)
    found = []
    for s in range(220):
        left = paths or (("router.weight",) if s >= until else ())
        norms_ = {p: 1.0 for p in parameters if p not in left}
        found.append(
            make_record(s, index, loss=falling(s), grad_norm=norms_, **({"output_std": gives} if s % 20 == 0 else {}))
        )
    return found


def batches(mean: Any, val: float = 1.0) -> list[StepRecord]:
    """A loss that falls to nothing, batches of this mean, and a validation now and then."""
    is_sampled = [s for s in range(300) if s % 50 == 0 or s in (1, 2, 4)]
    sampled = {
        s: {"input_mean": mean(s), "input_std": 1.0, "input_absmax": 3.0, "target_variance": 1.0} for s in is_sampled
    }
    return [
        make_record(s, loss=2.0 * 0.97**s + 1e-3, **sampled.get(s, {}), **({"val_loss": val} if s % 50 == 49 else {}))
        for s in range(300)
    ]


def modes(mode: Any, share: float) -> list[StepRecord]:
    return steady(20, loss=1.0, num_samples=64, target_mode=mode, target_mode_share=share)


def tails(of: Any) -> list[StepRecord]:
    return steady(60, loss=1.0, target_tail=lambda s: of(s)[0], squared_error=lambda s: of(s)[1], target_min=-2.0, target_max=9.0)  # fmt: skip


def scale(variance: float, largest: float) -> list[StepRecord]:
    return steady(200, loss=1.0, target_variance=every(20, variance), squared_error=1.0, output_min=-1.0, output_max=largest)  # fmt: skip


def jumped(applied: float, times: int = 1) -> list[StepRecord]:
    """Norms a thousand times the others, and what a trainer's own clip lets pass of them."""
    high = range(50, 50 + times)
    one = steady(60, global_norm=lambda s: np.exp(jitter(s)) * (1000 if s in high else 1))
    return [replace(r, scalars={"trainer_clip": applied}) for r in one]


def beginnings(loss: float, first: Any = None) -> list[StepRecord]:
    """Large updates in the first steps, small ones later; the loss of the later steps."""
    large = norms(0.8, 1.1, 1.5) if first is None else first
    updates = {s: large if s < 10 else norms(0.01, 0.01, 0.01) for s in (0, 1, 2, 4, 8, *range(50, 300, 50))}
    return steady(300, loss=lambda s: 2.3 if s < 5 else loss, update_ratio=updates.get)


def attends(logit: Any, entropy: Any = lambda k: 0.7, loss: Any = 2.3) -> list[StepRecord]:
    """The attention of three modules, measured at every 50th step, of which the second goes its own way."""
    return steady(
        600,
        loss=loss,
        attention_logit_max=every(50, lambda s: modules(1.0, logit(s // 50), 1.0)),
        attention_entropy=every(50, lambda s: modules(0.6, entropy(s // 50), 0.6)),
    )


UNITS = make_index((), MODULES, types=dict.fromkeys(MODULES, "ReLU"))
STACK = ("blocks.0", "blocks.0.mlp", "blocks.1", "blocks.1.mlp", "blocks.2", "blocks.2.mlp")
BLOCKS = make_index((), STACK, types={p: "Linear" if p.endswith("mlp") else "Block" for p in STACK})


def dormant(share: Any, loss: Any = 2.3, index: Any = UNITS) -> list[StepRecord]:
    """The units of three activations, measured at every 50th step, of which the second goes its own way."""
    return steady(600, index=index, loss=loss, dormant_fraction=every(50, lambda s: modules(0.1, share(s // 50), 0.1)))


def stream(size: Any, loss: Any, index: Any = BLOCKS) -> list[StepRecord]:
    """What goes through three blocks, measured at every 50th step."""
    sizes = every(50, lambda s: dict.fromkeys(index.paths, size(s // 50)))
    return steady(1000, index=index, loss=loss, output_rms=sizes)


def validated(mean: float, std: float, val_loss: float) -> list[StepRecord]:
    """Two validations, and what their inputs are like; those of training have mean 0 and deviation 1."""
    seen = every(40, lambda s: val_loss if s else None)
    given = {"val_input_mean": every(40, mean), "val_input_std": every(40, std), "val_loss": seen}
    return steady(
        100, loss=lambda s: 2.0 if s < 5 else 0.5, input_mean=every(20, 0.0), input_std=every(20, 1.0), **given
    )


def sequences(loss: Any) -> list[StepRecord]:
    measured = (0, 1, 2, 4, 8, 16, 32, 50, 100)
    given = {s: loss(s) for s in measured}
    return steady(120, loss=loss, cross_entropy=given.get, cross_entropy_shifted=given.get, baseline_loss=2.3)


def by_heart(val_loss: float, until: int = 0) -> list[StepRecord]:
    """A training loss from far above a guess to hardly below it, and a validation loss that stays."""
    loss = lambda s: (2.31 if s < until else 2.2) + 2.5 * 0.9**s  # noqa: E731
    known = {"cross_entropy": every(20, loss), "baseline_loss": every(20, 2.3)}
    return steady(420, loss=loss, val_loss=every(50, lambda s: val_loss if s else None), **known)


def flat(followed: str, right: str) -> list[StepRecord]:
    """A loss and a formula that hardly vary, each in its own way, beside a right one that does."""
    rng = np.random.default_rng(0)
    noise_ = lambda scale: float(scale * rng.normal())  # noqa: E731
    varied = [(1.86 + noise_(0.003), 2.0 + noise_(0.01), 1.0 + noise_(0.5)) for _ in range(12)]
    return [make_record(s, loss=a, **{followed: b, right: c}) for s, (a, b, c) in enumerate(varied)]


def attention(*names: str) -> list[StepRecord]:
    """Two weights with next to no gradient before all others."""
    index = make_index(tuple(f"{name}.weight" for name in (*names, "value", "out")), ())
    sizes = dict(zip(index.paths, (1e-6, 1e-6, 1.0, 1.0), strict=True))
    return [make_record(s, index, loss=STUCK, grad_norm=sizes) for s in range(200)]


UNMOVED = {"update_norm": norms(0, 0, 0), "param_norm": norms(1, 1, 1), "grad_norm": norms(1, 1, 1), "global_norm": 1.7}
PLAYERS = make_index(("netG.0.weight", "netD.0.weight"), ())


def game(own: float, others: float, index: Any = None) -> list[StepRecord]:
    """Losses of a critic, and of its opponent where they are named; beside each the other's last one."""
    turn = (lambda s: s % 2) if index else (lambda s: 1)
    mine, theirs = (lambda s: 1.4 if s < 5 else own), (lambda s: 0.7 if s < 5 else others)
    swapped = lambda s: turn(s) == 0  # noqa: E731
    return steady(
        300,
        optimizer=turn,
        index=index,
        loss=lambda s: theirs(s) if swapped(s) else mine(s),
        others_loss=lambda s: mine(s) if swapped(s) else theirs(s),
    )


def classes(
    cross_entropy: Any, loss: Any = lambda s: 0.99**s, largest: int = 2, reach: float = 3.0
) -> list[StepRecord]:
    """A loss that falls, and the cross-entropy of three classes that it is not."""
    known = {
        "num_classes": 3,
        "output_units": 3,
        "target_max": largest,
        "baseline_loss": 1.09,
        "output_min": -reach,
        "output_max": reach,
    }
    return steady(300, loss=loss, cross_entropy=every(20, cross_entropy), **known)


def scored(*scores: float) -> list[StepRecord]:
    """A training loss that falls, and a validation loss that follows, with these scores beside it."""
    loss = lambda s: 0.2 + 0.8 * 0.99**s  # noqa: E731
    given = {"val_loss": every(50, lambda s: 1.1 * loss(s) if s else None)}
    return steady(
        50 * len(scores) + 10, loss=loss, val_iou=every(50, lambda s: scores[s // 50 - 1] if s else None), **given
    )


def ended(num: int, share: float) -> list[StepRecord]:
    """A run that ends after so many steps, its loss at this share of a guess's."""
    level = lambda s: 0.693 * (share if s > 20 else 1.0) * (1 + 0.02 * (-1) ** s)  # noqa: E731
    known = {"cross_entropy": every(20, level), "baseline_loss": every(20, 0.693)}
    return steady(num, loss=level, end_of_run=lambda s: 1.0 if s == num - 1 else None, **known)


STUCK, GOOD = 2.3, falling
SHUFFLED = [i for epoch in range(20) for i in np.random.default_rng(epoch).permutation(10).tolist()]
CREEPING = norms(1e-5, 1e-4, 5e-5)
jitter, grow = noise(0.2), noise(0.1, 1)
KINDS = {"shapes": {"target_row_sum_min": 1, "target_row_sum_max": 1, "target_min": 0, "target_max": 1}}
HEALTHY_NORMS = norms(1.0, 2.0, 3.0)
CLIP = (TreatmentReport(name="clip_by_global_norm", before=2, after=1),)
ONE_HOT = {"target_min": 0, "target_max": 1, "target_row_sum_min": 1, "target_row_sum_max": 1, "batch_size": 32}

SHIFTED_BY_0 = {"target_at_minus_1": 0.1, "target_at_0": 1, "target_at_1": 0.1, "target_at_2": 0.1}
SHIFTED_BY_1 = {"target_at_minus_1": 0.1, "target_at_0": 0.1, "target_at_1": 1, "target_at_2": 0.1}

EXPERTS = make_index([f"moe.experts.{k}.{part}" for k in range(4) for part in ("up.weight", "down.weight")], ())


HOLLOW = replace(make_index(), numel=np.array([0, 100, 100, 0, 0, 0]))


def of_experts(*values: float) -> dict[str, float]:
    return {f"moe.experts.{k}.{part}": v for k, v in enumerate(values) for part in ("up.weight", "down.weight")}


def shrinking(s: int) -> dict[str, float]:
    return norms(*[18 * max(0.4, 0.98**s)] * 3)


def blank(reason: str) -> list[StepRecord]:
    return [replace(record, unseen={"": reason}) for record in steady(40, loss=2.0, has_gradient=False)]


def case(rule: str, records: Records, expected: bool, name: str, **settings: Any) -> Any:
    return pytest.param(rule, records, expected, settings, id=f"{rule}-{name}")


CASES = [
    case("non_finite", lambda: steady(3, loss=float("nan")), True, "loss"),
    case("non_finite", lambda: steady(3, grad_norm=norms(1, float("inf"))), True, "gradient"),
    case("non_finite", lambda: steady(3, output_nonfinite=modules(0, 2)), True, "activation"),
    case("non_finite", lambda: steady(3, output_nonfinite=modules(0, 2), loss=1.0, grad_norm=HEALTHY_NORMS), False, "mask"),
    case("non_finite", lambda: steady(3, output_nonfinite=modules(0, 2), loss=float("inf")), True, "activation-and-loss"),
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
    case("not_updating", lambda: steady(60, **UNMOVED, lr=0.1, global_norm_applied=1e-6), False, "clipped-to-next-to-nothing"),
    case("not_updating", lambda: steady(60, **UNMOVED, lr=0.1, global_norm_applied=1.0), True, "clipped-as-usual"),
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
    case("not_learning", lambda: steady(150, loss=lambda s: 2.3 + 0.02 * grow(s), **{"kind/fine_tuning": 1.0}), False, "short-fine-tuning"),
    case("not_learning", lambda: steady(301, loss=lambda s: 2.3 + 0.02 * grow(s), **{"kind/fine_tuning": 1.0}), True, "fine-tuning"),
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
    case("bad_initial_loss", lambda: steady(3, loss=60.0, cross_entropy=2.4, num_samples=7, expected_initial_loss=2.3), False, "other-terms"),
    case("bad_initial_loss", lambda: steady(3, loss=76.8, cross_entropy=2.4, num_samples=32, expected_initial_loss=2.3), True, "summed"),
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
    case("overfit", lambda: steady(100, loss=GOOD, val_loss=every(10, lambda s: 1.0 if s < 20 else 2.0), val_acc=every(10, lambda s: min(0.9, 0.5 + s / 50))), False, "predicts-as-well"),
    case("overfit", lambda: steady(100, loss=GOOD, val_loss=every(10, lambda s: 1.0 if s < 20 else 2.0), val_acc=every(10, lambda s: 0.9 if s < 20 else 0.8)), True, "predicts-worse"),
    case("val_not_learning", lambda: steady(100, loss=GOOD, val_loss=every(10, 2.3)), True, "stays"),
    case("val_not_learning", lambda: steady(400, loss=lambda s: 2.3 - s / 1000, val_loss=every(20, 2.3)), True, "untrained-level"),
    case("val_not_learning", lambda: steady(400, loss=lambda s: max(0.2, 2.3 - s / 20), val_loss=every(20, 0.3)), False, "learned-at-once"),
    case("val_not_learning", lambda: steady(300, loss=lambda s: 0.4 * 0.98**s + 0.04, squared_error=lambda s: 0.4 * 0.98**s + 0.04, target_variance=0.08, val_loss=every(10, 0.1)), True, "worse-than-a-constant"),
    case("val_not_learning", lambda: steady(300, loss=lambda s: 0.4 * 0.98**s + 0.04, squared_error=lambda s: 0.4 * 0.98**s + 0.04, target_variance=0.08, val_loss=every(10, 0.06)), False, "better-than-a-constant"),
    case("val_not_learning", lambda: steady(300, loss=lambda s: 2.3 * 0.97**s + 0.1, cross_entropy=lambda s: 2.3 * 0.97**s + 0.1, baseline_loss=2.3, squared_error=lambda s: 1.1 * (2.3 * 0.97**s + 0.1), target_variance=0.09, val_loss=every(10, lambda s: 2.3 * 0.97**s + 0.12)), False, "a-squared-error-of-scores-that-chances-to-be-near"),
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
    case("rank_divergence", lambda: steady(2, rank_spread=0.0, replicas_differ=1, replica_gradients_differ=0, replica_rank=2), True, "a-flipped-bit"),
    case("rank_divergence", lambda: steady(2, rank_spread=0.0, replicas_differ=0, replica_gradients_differ=1, replica_rank=-1), True, "of-a-gradient"),
    case("rank_divergence", lambda: steady(2, rank_spread=0.0, replicas_differ=0, replica_gradients_differ=0), False, "the-same-bits"),
    case("recomputation_differs", lambda: steady(2, recompute_differs=1, recompute_elements={"b.weight": 3.0}, recompute_rank=0), True, "three-elements"),
    case("recomputation_differs", lambda: steady(2, recompute_differs=0, recompute_elements={"b.weight": 0.0}), False, "the-same"),
    case("repeated_order", lambda: steady(60, batch_fingerprint=lambda s: s % 7), True, "seven-in-order"),
    case("repeated_order", lambda: steady(60, batch_fingerprint=5), True, "one-batch"),
    case("repeated_order", lambda: steady(60, batch_fingerprint=lambda s: s // 2), True, "each-twice"),
    case("repeated_order", lambda: steady(200, batch_fingerprint=lambda s: SHUFFLED[s % 200]), False, "shuffled-anew"),
    case("repeated_order", lambda: steady(60, batch_fingerprint=lambda s: s), False, "never-again"),
    case("same_batches_on_ranks", lambda: steady(4, ranks_alike=2, batch_fingerprint=lambda s: s), True, "no-sampler"),
    case("same_batches_on_ranks", lambda: steady(4, ranks_alike=0, batch_fingerprint=lambda s: s), False, "each-its-own"),
    case("same_batches_on_ranks", lambda: steady(9, ranks_alike=2, batch_fingerprint=5), False, "all-data-are-one-batch"),
    case("same_batches_on_ranks", lambda: steady(9, ranks_alike=lambda s: 2 * (s % 3 == 0), batch_fingerprint=lambda s: s), False, "now-and-then"),
    case("dead_signal", lambda: steady(250, loss=0.0, global_norm=lambda s: 1 + 0.1 * (s % 7)), True, "filtered-nan"),
    case("dead_signal", lambda: steady(250, loss=lambda s: 2 + 0.1 * (s % 7), global_norm=0.0), True, "norm-zero"),
    case("dead_signal", lambda: steady(400, loss=lambda s: max(0.0, 1 - s / 100), global_norm=lambda s: max(0.0, 1 - s / 100)), False, "solved"),
    case("not_learning", lambda: steady(360, loss=4.0, cross_entropy=every(50, 2.28), baseline_loss=every(50, 2.3)), True, "no-better-than-guessing"),
    case("not_learning", lambda: steady(900, loss=lambda s: 9.0 * 0.97**s + 2.3 + 0.5 * grow(s), cross_entropy=every(50, lambda s: 9.0 * 0.97**s + 2.3), baseline_loss=every(50, 2.3)), True, "a-bad-start-is-no-level"),
    case("not_learning", lambda: steady(900, loss=lambda s: 2.3 - 0.3 * min(s / 100, 1), cross_entropy=every(50, 2.0), baseline_loss=every(50, 2.3)), False, "hard-but-better-than-guessing"),
    case("not_learning", lambda: steady(360, loss=lambda s: 2.4 - s / 1000, cross_entropy=every(50, lambda s: 2.4 - s / 1000), baseline_loss=every(50, 2.3)), False, "on-its-way"),
    case("not_learning", lambda: steady(360, loss=lambda s: 2.4 - s * 3e-4, lr=lambda s: s * 1e-6, cross_entropy=every(50, 2.3), baseline_loss=every(50, 2.3)), False, "warm-up"),
    case("not_learning", lambda: steady(900, loss=0.7, optimizer=lambda s: s % 2, cross_entropy=0.69, baseline_loss=0.69), False, "two-that-play"),
    case("not_learning", lambda: steady(360, loss=0.5, squared_error=every(50, 0.99), target_variance=every(50, 1.0)), True, "no-better-than-the-mean"),
    case("not_learning", lambda: steady(900, loss=lambda s: (0.72 if s < 20 else 0.693) - s * 2e-6, squared_error=every(50, lambda s: 0.249 - s * 1e-6), target_variance=every(50, 0.25)), False, "leaves-a-plateau"),
    case("not_learning", lambda: steady(900, loss=0.1, cross_entropy=every(50, 0.1), baseline_loss=every(50, 2.3), squared_error=every(50, 40.0), target_variance=every(50, 0.09)), False, "rows-of-classes"),
    case("not_learning", lambda: steady(900, loss=lambda s: 3.0 * 0.99**s + 0.2, squared_error=every(50, 9.0), target_variance=every(50, 4.0)), False, "logarithms-of-rates"),
    case("weights_overwritten", lambda: steady(200, loss=STUCK, optimizer=0, written_between=every(50, 1.0)), False, "clipped-critic"),
    case("learning_rate_gone", lambda: steady(200, lr=lambda s: 0.1 * 0.5**s), True, "halved-each-step"),
    case("learning_rate_gone", lambda: steady(500, lr=lambda s: 0.1 * 0.5 ** (s // 100)), False, "halved-now-and-then"),
    case("learning_rate_gone", lambda: steady(1000, lr=lambda s: 0.05 * (1 + np.cos(np.pi * s / 1000))), False, "cosine"),
    case("weight_decay_too_large", lambda: steady(200, loss=STUCK, weight_decay=every(50, 0.5), param_norm=every(50, shrinking), update_norm=every(50, norms(1, 1, 1)), grad_norm=HEALTHY_NORMS), True, "l2"),
    case("weight_decay_too_large", lambda: steady(200, loss=GOOD, weight_decay=every(50, 0.5), param_norm=every(50, shrinking), update_norm=every(50, norms(1, 1, 1)), grad_norm=HEALTHY_NORMS), False, "learns"),
    case("weight_decay_too_large", lambda: steady(200, loss=STUCK, weight_decay=every(50, 0.1), decay_is_decoupled=every(50, 1), param_norm=every(50, norms(9, 9, 9)), update_norm=every(50, norms(1, 1, 1)), grad_norm=HEALTHY_NORMS), False, "beside-the-gradient"),
    case("weight_decay_too_large", lambda: steady(200, loss=STUCK, lr=1.0, weight_decay=every(50, 0.1), decay_is_decoupled=every(50, 1), param_norm=every(50, shrinking), update_norm=every(50, norms(1, 1, 1)), grad_norm=HEALTHY_NORMS), True, "updates-are-decay"),
    case("weight_decay_too_large", lambda: steady(200, loss=STUCK, weight_decay=every(50, 0.5), param_norm=every(50, norms(9, 9, 9)), update_norm=every(50, norms(1, 1, 1)), grad_norm=norms(1e-3, 1e-3, 1e-3)), False, "the-gradient-is-gone"),
    case("epsilon_too_large", lambda: steady(200, loss=STUCK, epsilon=every(50, 0.1), second_moments=every(50, (0.1 / 300) ** 2), num_second_moments=every(50, 1)), True, "outweighs"),
    case("epsilon_too_large", lambda: steady(200, loss=GOOD, epsilon=every(50, 1e-8), second_moments=every(50, (1e-8 / 300) ** 2), num_second_moments=every(50, 1)), False, "converged"),
    case("epsilon_too_large", lambda: steady(200, loss=STUCK, epsilon=every(50, 1e-8), second_moments=every(50, 1e-8), num_second_moments=every(50, 1)), False, "usual"),
    case("eval_mode", lambda: steady(200, batch_norm_in_eval=every(50, 1), batch_norm_batches=every(50, 0), batch_norm_means=every(50, 0)), True, "never-in-training-mode"),
    case("eval_mode", lambda: steady(200, batch_norm_in_eval=every(50, 1), batch_norm_batches=every(50, 0), batch_norm_means=every(50, 3.0)), False, "came-with-statistics"),
    case("eval_mode", lambda: steady(200, batch_norm_in_eval=every(50, 1), batch_norm_batches=every(50, 10000)), False, "frozen-on-purpose"),
    case("eval_mode", lambda: steady(400, batch_norm_in_eval=every(50, lambda s: s > 100), batch_norm_batches=every(50, lambda s: min(s, 100))), True, "since-a-validation"),
    case("eval_mode", lambda: steady(400, dropout_in_eval=every(50, lambda s: s > 100)), True, "dropout-since-a-validation"),
    case("eval_mode", lambda: steady(400, dropout_in_eval=every(50, 1)), False, "dropout-off-by-choice"),
    case("batch_norm_statistics", lambda: steady(200, loss=GOOD, val_loss=every(20, 3.0), batch_norm_followed=every(50, 0.1), batch_norm_batches=every(50, lambda s: s), batch_norm_momentum=every(50, 1e-3)), True, "do-not-follow"),
    case("batch_norm_statistics", lambda: steady(200, loss=GOOD, val_loss=every(20, falling), batch_norm_followed=every(50, 0.1), batch_norm_batches=every(50, lambda s: s), batch_norm_momentum=every(50, 1e-3)), False, "validation-is-as-good"),
    case("batch_norm_statistics", lambda: steady(200, loss=GOOD, val_loss=every(20, 3.0), batch_norm_followed=every(50, 1.0), batch_norm_batches=every(50, lambda s: s), batch_norm_momentum=every(50, 0.1)), False, "follow"),
    case("targets_shifted", lambda: steady(5, loss=3.0, cross_entropy=3.0, cross_entropy_shifted=4.0, **SHIFTED_BY_0), True, "not-shifted"),
    case("targets_shifted", lambda: steady(5, loss=4.0, cross_entropy=3.0, cross_entropy_shifted=4.0, **SHIFTED_BY_0), False, "shifted-in-the-model"),
    case("targets_shifted", lambda: steady(5, loss=3.0, cross_entropy=3.0, cross_entropy_shifted=4.0, **SHIFTED_BY_1), False, "the-next-token"),
    case("targets_shifted", lambda: steady(5, loss=4.0, cross_entropy=3.0, cross_entropy_shifted=4.0, **SHIFTED_BY_1), True, "shifted-twice"),
    case("targets_shifted", lambda: steady(5, loss=lambda s: 23 / 24 * (4.17 - s / 200), cross_entropy=4.0, cross_entropy_shifted=lambda s: 4.17 - s / 200, **SHIFTED_BY_0), False, "shifted-in-the-model-and-divided-by-all-places"),
    case("targets_shifted", lambda: steady(5, loss=lambda s: 4.0 - s / 200 + s % 2 / 100, cross_entropy=lambda s: 4.0 - s / 200, cross_entropy_shifted=lambda s: 4.1 + s / 40, **SHIFTED_BY_0), True, "not-shifted-and-rounded"),
    case("targets_shifted", lambda: steady(5, loss=3.0, cross_entropy=3.0, target_at_0=1, target_at_1=1, target_at_2=1, target_at_minus_1=1), False, "all-tokens-alike"),
    case("whole_targets", lambda: steady(8, target_is_whole=1, target_min=-3, target_max=3), True, "standardised-and-cast"),
    case("whole_targets", lambda: steady(8, target_is_whole=1, target_min=0, target_max=9), False, "counts"),
    case("whole_targets", lambda: steady(8, target_is_whole=1, target_min=-1, target_max=1), False, "signs"),
    case("whole_targets", lambda: steady(8, target_is_whole=lambda s: s % 2, target_min=-3, target_max=3), False, "by-chance"),
    case("loss_terms", lambda: steady(300, loss=50.0, squared_error=every(50, 0.9), target_variance=every(50, 1.0)), True, "a-penalty-outweighs"),
    case("loss_terms", lambda: steady(300, loss=50.0, squared_error=every(50, 0.01), target_variance=every(50, 1.0)), False, "learned-all-the-same"),
    case("loss_terms", lambda: steady(300, loss=28.8, num_samples=32, squared_error=every(50, 0.9), target_variance=every(50, 1.0)), False, "summed-over-the-batch"),
    case("mistaken_loss", lambda: formulas("binary_cross_entropy_twice", "binary_cross_entropy"), True, "sigmoid-twice"),
    case("idle_experts", lambda: [make_record(s, EXPERTS, loss=STUCK, grad_norm=of_experts(1, 0, 0, 0)) for s in range(150)], True, "one-for-all"),
    case("idle_experts", lambda: [make_record(s, EXPERTS, loss=STUCK, grad_norm=of_experts(*(float(k == s % 4) for k in range(4)))) for s in range(150)], False, "one-at-a-time"),
    case("idle_experts", lambda: [make_record(s, make_index([f"heads.{k}.weight" for k in range(4)], ()), loss=STUCK, grad_norm={"heads.0.weight": 1.0}) for s in range(150)], False, "heads-wait-their-turn"),
    case("idle_experts", lambda: [make_record(s, EXPERTS, loss=STUCK, grad_norm=of_experts(1, 1, 1, 0)) for s in range(150)], False, "one-is-unused"),
    case("restarted", lambda: steady(300, loss=lambda s: 4 - 0.02 * min(s % 205, 100), param_norm=every(50, lambda s: norms(*[1 + 0.01 * (s % 205)] * 3))), True, "weights-too"),
    case("restarted", lambda: steady(300, loss=lambda s: 4 - 0.02 * min(s % 205, 100), param_norm=every(50, lambda s: norms(*[1 + 0.01 * s] * 3))), False, "new-data"),
    case("restarted", lambda: steady(300, loss=falling, param_norm=every(50, lambda s: norms(*[1 + 0.01 * (s % 205)] * 3))), False, "loss-goes-on"),
    case("dead_signal", lambda: blank(NO_BACKWARD), True, "reset-before-the-step"),
    case("dead_signal", lambda: blank(STEPS_INSIDE), False, "used-up-inside-backward"),
    case("blown_up", lambda: steady(30, loss=lambda s: 0.1 if s == 0 else (-1.0) ** s, batch_size=32), False, "no-level"),
    case("blown_up", lambda: steady(30, loss=lambda s: 2.3 if s == 0 else 100.0 * 0.9**s, update_ratio=norms(0.01, 0.01)), False, "unknown-batch-and-small-steps"),
    case("blown_up", lambda: steady(30, loss=lambda s: 2.3 if s == 0 else 100.0 * 0.9**s, update_ratio=norms(0.01, 0.5)), True, "unknown-batch-and-large-steps"),
    case("vanishing", lambda: steady(loss=STUCK, grad_norm=norms(1, 1e-6, 1)), False, "in-the-middle"),
    case("dead", lambda: steady(60, loss=STUCK, output_std=modules(1, 1), grad_norm=norms(1, 1)), False, "did-not-run"),
    case("update_too_small", lambda: steady(loss=STUCK, grad_norm=norms(0, 1, 1), update_ratio=every(50, norms(0, 1e-3, 1e-3))), False, "no-gradient"),
    case("weights_overwritten", lambda: steady(200, loss=STUCK, written_between=every(50, 1.0)), True, "all"),
    case("weights_overwritten", lambda: steady(200, loss=GOOD, written_between=every(50, 1.0)), False, "learns"),
    case("weights_overwritten", lambda: steady(200, loss=STUCK, written_between=every(50, 0.1)), False, "a-few"),
    case("diverging", lambda: steady(200, loss=lambda s: 40 - 3.0 * s, squared_error=0.9, target_variance=1.0), True, "below-zero-and-wrong"),
    case("diverging", lambda: steady(200, loss=lambda s: 40 - 3.0 * s, squared_error=0.01, target_variance=1.0), False, "below-zero-and-right"),
    case("diverging", lambda: steady(200, loss=lambda s: 0.1 + 0.2 * s, grad_norm=lambda s: norms(1 + s)), True, "grows"),
    case("diverging", lambda: steady(200, loss=lambda s: 0.1 + 0.2 * s, grad_norm=lambda s: norms(1 + s), **{"kind/rl": 1.0}), False, "grows-with-values"),
    case("diverging", lambda: steady(200, loss=lambda s: 0.1 + 0.2 * s, grad_norm=lambda s: norms(1 + s), squared_error=every(10, 1.0), target_min=0.0, target_max=lambda s: 1 + float(s)), False, "grows-with-targets"),
    case("gradient_growth", lambda: steady(700, loss=STUCK, grad_norm=lambda s: norms(1.01**s), **{"kind/rl": 1.0}), False, "grows-with-values"),
    case("blown_up", lambda: steady(30, loss=lambda s: 500.0 if s % 4 == 1 else 1.0, batch_size=32), False, "bad-batches-between-good-ones"),
    case("weight_decay_too_large", lambda: decayed(0.0005, 1e-5), False, "usual-and-the-gradient-vanishes"),
    case("not_learning", lambda: guessing(2.5, 220), True, "worse-than-guessing"),
    case("not_learning", lambda: steady(220, loss=GOOD, cross_entropy=every(20, GOOD), baseline_loss=every(20, 2.3), num_samples=64), False, "better-than-guessing"),
    case("not_learning", lambda: steady(400, loss=STUCK, **{"kind/rl": 1.0}), False, "values-need-not-fall"),
    case("mistaken_loss", lambda: steady(4, loss=STUCK, loss_of_softmax=1.0), True, "softmax-in-the-graph"),
    case("mistaken_loss", lambda: steady(40, loss=STUCK, loss_of_softmax=0.0, loss_of_sigmoid=0.0), False, "neither-in-the-graph"),
    case("val_not_learning", lambda: steady(300, loss=GOOD, val_loss=every(50, 60.0)), True, "of-another-scale"),
    case("val_not_learning", lambda: steady(300, loss=GOOD, val_loss=every(50, lambda s: 0.5 if s < 60 else 60.0)), False, "was-good-once"),
    case("sees_future", lambda: tokens(attention_sees_all=1.0, target_at_1=1.0), True, "no-mask"),
    case("sees_future", lambda: tokens(attention_sees_all=0.5, target_at_1=1.0), False, "cross-attention"),
    case("sees_future", lambda: tokens(attention_sees_all=1.0, target_at_1=0.1), False, "other-targets"),
    case("sees_future", lambda: tokens(attention_sees_all=1.0, target_at_0=1.0, cross_entropy_shifted=STUCK), True, "shifted-inside"),
    case("cut_off", lambda: cut("router.weight"), True, "router"),
    case("cut_off", lambda: cut("router.weight", ran=()), False, "does-not-run"),
    case("cut_off", lambda: cut("teacher.a.weight", "teacher.b.weight"), False, "a-twin"),
    case("cut_off", lambda: cut(until=20), False, "had-one-once"),
    case("repeated_batch", lambda: batches(lambda s: 0.5), True, "the-same"),
    case("repeated_batch", lambda: batches(lambda s: 0.5 + 1e-9 * s), False, "others"),
    case("repeated_batch", lambda: batches(lambda s: 0.5, val=0.2), False, "all-the-data-and-it-carries-over"),
    case("repeated_targets", lambda: modes(lambda s: 0.01 * s + 0.001, 0.9), True, "another-number-each-time"),
    case("repeated_targets", lambda: modes(lambda s: 0.25, 0.9), False, "a-rare-event"),
    case("repeated_targets", lambda: modes(lambda s: 0.01 * s + 0.001, 0.2), False, "few"),
    case("target_outliers", lambda: tails(lambda s: (5000.0, 3e4) if s == 30 else (8.0, 1.0)), True, "one-batch"),
    case("target_outliers", lambda: tails(lambda s: (5000.0, 3e4)), False, "every-batch"),
    case("target_outliers", lambda: tails(lambda s: (5000.0, 2.0) if s == 30 else (8.0, 1.0)), False, "no-error-of-note"),
    case("target_scale", lambda: scale(1e7, 2.0), True, "rewards-of-thousands"),
    case("target_scale", lambda: scale(1e7, 3000.0), False, "outputs-reach-them"),
    case("target_scale", lambda: scale(1.0, 0.01), False, "unit"),
    case("exploding", lambda: jumped(1.0), False, "clipped-behind-the-look"),
    case("exploding", lambda: jumped(1.0, 3), False, "clipped-again-and-again"),
    case("exploding", lambda: jumped(900.0), True, "reached-the-optimizer"),
    case("exploding", lambda: jumped(1.0), True, "clipped-but-has-a-treatment", then=ClipToLimit()),
    case("update_too_large", lambda: beginnings(2.3), True, "lost-in-the-first-steps"),
    case("update_too_large", lambda: beginnings(1.5), False, "large-first-steps-and-learns"),
    case("update_too_large", lambda: beginnings(2.3, norms(0.01, 0.01, 1.5)), False, "one-that-starts-near-zero"),
    case("val_not_learning", lambda: validated(5.0, 6.0, 1.5), True, "inputs-of-another-scale"),
    case("val_not_learning", lambda: validated(0.1, 1.2, 1.5), False, "inputs-alike-and-early"),
    case("val_not_learning", lambda: validated(5.0, 6.0, 0.5), False, "inputs-of-another-scale-and-no-harm"),
    case("overfit", lambda: steady(300, loss=GOOD, val_loss=every(25, lambda s: 1 + s / 50), val_input_std=every(25, 0.5)), True, "inputs-are-no-score"),
    case("output_range", lambda: steady(8, loss=1.0, loss_of_shares=1, target_min=0, target_max=255), True, "masks-of-255"),
    case("output_range", lambda: steady(8, loss=1.0, loss_of_shares=1, target_min=0, target_max=1), False, "masks"),
    case("output_range", lambda: steady(8, loss=1.0, loss_of_shares=0, target_min=0, target_max=255), False, "another-loss"),
    case("vanishing", lambda: attention("query", "key"), False, "queries-and-keys-of-an-even-attention"),
    case("vanishing", lambda: attention("first", "second"), True, "the-same-by-other-names"),
    case("too_good", lambda: sequences(lambda s: 2.3 if s < 5 else 0.001), True, "copies"),
    case("too_good", lambda: sequences(lambda s: 2.3 * 0.95**s), False, "learns"),
    case("too_good", lambda: sequences(lambda s: 0.001), False, "knew-it-before"),
    case("not_learning", lambda: guessing(lambda s: 5.5 - 0.002 * s, 220), True, "far-above-and-hardly-nearer"),
    case("not_learning", lambda: guessing(lambda s: 1 + 5 * 0.995**s, 220), False, "far-above-and-on-its-way"),
    case("val_not_learning", lambda: by_heart(2.35), True, "noise-learned-by-heart"),
    case("val_not_learning", lambda: by_heart(2.35, 300), True, "noise-learned-by-heart-at-last"),
    case("val_not_learning", lambda: by_heart(2.2), False, "hardly-better-than-a-guess"),
    case("mistaken_loss", lambda: flat("cross_entropy_over_batch", "cross_entropy"), False, "what-hardly-varies-follows-nothing"),
    case("dropout_too_large", lambda: steady(200, loss=STUCK, dropout_rate=every(50, 0.95)), True, "what-is-kept-for-what-goes"),
    case("dropout_too_large", lambda: steady(200, loss=STUCK, dropout_rate=every(50, 0.5)), False, "usual"),
    case("dropout_too_large", lambda: steady(200, loss=GOOD, dropout_rate=every(50, 0.95)), False, "learns-all-the-same"),
    case("one_sided", lambda: game(0.004, 6.0), True, "the-critic-has-won"),
    case("one_sided", lambda: game(0.4, 6.0), False, "the-critic-is-better"),
    case("one_sided", lambda: game(0.004, 0.5), False, "both-are-content"),
    case("one_sided", lambda: game(-4.0, 6.0), False, "no-level"),
    case("no_contest", lambda: game(0.004, 0.004, PLAYERS), True, "both-win"),
    case("no_contest", lambda: game(0.004, 0.004), False, "two-networks-that-do-not-play"),
    case("no_contest", lambda: game(0.004, 0.5, PLAYERS), False, "one-is-content"),
    case("no_contest", lambda: game(-4.0, -4.0, PLAYERS), False, "both-without-a-level"),
    case("leaked_targets", lambda: steady(40, target_in_inputs=every(8, 1.0)), True, "in-every-batch"),
    case("leaked_targets", lambda: steady(40, target_in_inputs=every(8, lambda s: float(s % 16 == 0))), False, "in-some"),
    case("wrong_objective", lambda: classes(lambda s: 1.1), True, "a-regression-on-class-numbers"),
    case("wrong_objective", lambda: classes(lambda s: 1.1 * 0.99**s), False, "shares-of-classes-by-squared-error"),
    case("wrong_objective", lambda: classes(lambda s: 1.1, largest=1), False, "as-many-units-by-chance"),
    case("wrong_objective", lambda: classes(lambda s: 1.1, reach=0.9), False, "cosines-that-the-loss-takes-multiples-of"),
    case("wrong_objective", lambda: classes(lambda s: 1.1, loss=lambda s: 1.0 - 0.001 * s), False, "has-hardly-fallen"),
    case("bad_initial_loss", lambda: steady(3, loss=40.0, binary_cross_entropy=40.0), True, "of-two"),
    case("bad_initial_loss", lambda: steady(3, loss=0.8, binary_cross_entropy=0.8), False, "ln-2"),
    case("bad_initial_loss", lambda: steady(3, loss=40.0, binary_cross_entropy=7.0), False, "no-cross-entropy-of-two"),
    case("restarted", lambda: steady(300, loss=lambda s: (4 - 0.02 * min(s % 205, 100)) * (1 + s % 2), param_norm=every(50, lambda s: norms(*[1 + 0.01 * (s % 205)] * 3))), False, "losses-that-scatter-as-far"),
    case("val_not_learning", lambda: scored(0.63, 0.2, 0.1, 0.2, 0.15, 0.2, 0.2), True, "a-score-that-is-lost"),
    case("val_not_learning", lambda: scored(0.63, 0.2, 0.1, 0.5, 0.15, 0.2, 0.2), False, "a-score-that-comes-back"),
    case("val_not_learning", lambda: validated(21.0, 119.0, 0.55), True, "inputs-of-another-scale-by-far"),
    case("constant_labels", lambda: steady(12, loss=0.5, target_min=0, target_max=0, target_is_integer=1, target_entropy=0.0, num_samples=32), True, "of-tokens"),
    case("output_range", lambda: steady(8, output_min=0.0, output_max=0.0, target_min=-3, target_max=3), False, "nothing-but-zeros"),
    case("not_learning", lambda: ended(250, 0.97), True, "a-short-run-at-a-guess"),
    case("not_learning", lambda: ended(250, 0.8), False, "a-short-run-that-learned"),
    case("blown_up", lambda: steady(30, loss=lambda s: 0.7 if s == 0 else 9.0, batch_size=32, optimizer=0), False, "the-opponent-learns"),
    case("blown_up", lambda: steady(30, loss=lambda s: 2.3 if s == 0 else 100.0 * 0.9**s, batch_size=32, update_ratio=norms(0.01, 0.01, 0.9)), False, "unknown-targets-and-one-large-step"),
    case("attention_logits_growing", lambda: attends(lambda k: 20.0 * 1.3**k), True, "grows"),
    case("attention_logits_growing", lambda: attends(lambda k: 120.0), True, "above-the-limit"),
    case("attention_logits_growing", lambda: attends(lambda k: 60.0 + k), False, "large-and-steady"),
    case("attention_logits_growing", lambda: attends(lambda k: 0.5 * 1.3**k), False, "sharpens-as-it-learns"),
    case("attention_logits_growing", lambda: attends(lambda k: float("inf") if k == 9 else 1.0), True, "infinite"),
    case("attention_entropy_collapse", lambda: attends(lambda k: 1.0, lambda k: 0.7 if k < 5 else 0.001), True, "all-heads-at-once"),
    case("attention_entropy_collapse", lambda: attends(lambda k: 1.0, lambda k: 0.7 if k < 5 else 0.001, loss=falling), False, "and-learns"),
    case("attention_entropy_collapse", lambda: attends(lambda k: 1.0, lambda k: 0.1 if k < 5 else 0.001), False, "sharp-from-the-start"),
    case("attention_entropy_collapse", lambda: attends(lambda k: 1.0, lambda k: 0.7 - 0.05 * k), False, "sharpens"),
    case("logits_drift", lambda: steady(500, loss=STUCK, output_log_z=every(50, lambda s: 2.3 - 0.1 * s), num_classes=every(50, 10)), True, "falls-for-ever"),
    case("logits_drift", lambda: steady(500, loss=STUCK, output_log_z=every(50, lambda s: 2.3 + 0.02 * s), num_classes=every(50, 10)), False, "within-the-limit"),
    case("logits_drift", lambda: steady(500, loss=STUCK, output_log_z=every(50, 80.0), num_classes=every(50, 10)), False, "large-and-steady"),
    case("logits_drift", lambda: steady(500, loss=STUCK, output_log_z=every(50, lambda s: 2.3 - 0.1 * s)), False, "no-classes"),
    case("steps_too_long", lambda: steady(80, loss=2.3, slope_after_step=0.2), True, "uphill"),
    case("steps_too_long", lambda: steady(80, loss=2.3, slope_after_step=lambda s: 0.002 * s), False, "hardly-uphill"),
    case("steps_too_long", lambda: steady(80, loss=2.3, slope_after_step=lambda s: 2.0 * (-1) ** s), False, "up-and-down"),
    case("steps_too_long", lambda: steady(80, loss=2.3, slope_after_step=-0.2), False, "downhill"),
    case("steps_too_long", lambda: steady(60, loss=lambda s: 2.3 * 0.98**s, slope_after_step=0.2), False, "and-the-loss-falls"),
    case("steps_too_long", lambda: steady(25, loss=2.3, slope_after_step=0.2), False, "too-few"),
    case("steps_too_long", lambda: steady(80, loss=noise(), slope_after_step=0.2), False, "a-loss-without-a-level"),
    case("steps_too_long", lambda: steady(80, loss=lambda s: 2.3 if s < 40 else 1e-4, slope_after_step=lambda s: -0.2 if s < 40 else 1e-4), False, "next-to-no-loss-is-left"),
    case("dormant_units_growing", lambda: dormant(lambda k: 0.06 * k, rising), True, "ever-more"),
    case("dormant_units_growing", lambda: dormant(lambda k: 0.06 * k, falling), False, "and-learns"),
    case("dormant_units_growing", lambda: dormant(lambda k: 0.06 * k), False, "as-good-as-ever"),
    case("dormant_units_growing", lambda: dormant(lambda k: 0.5, rising), False, "from-the-start"),
    case("dormant_units_growing", lambda: dormant(lambda k: 0.02 * k, rising), False, "few"),
    case("dormant_units_growing", lambda: dormant(lambda k: 0.06 * k, rising, index=make_index((), MODULES)), False, "no-activation"),
    case("residual_growing", lambda: stream(lambda k: 1.2**k, 2.3), False, "as-good-as-ever"),
    case("residual_growing", lambda: stream(lambda k: 1.2**k, lambda s: 2.3 if s < 300 else 2.4), True, "grows-for-nothing"),
    case("residual_growing", lambda: stream(lambda k: 1.2**k, falling), False, "grows-as-it-learns"),
    case("residual_growing", lambda: stream(lambda k: 1.05**k, rising), False, "grows-a-little"),
    case("residual_growing", lambda: stream(lambda k: 1.2**k, rising, make_index((), MODULES)), False, "no-blocks"),
    case("updates_rounded_away", lambda: steady(300, update_lost=every(50, norms(0.9, 0.8, 0.1))), True, "two-of-three"),
    case("updates_rounded_away", lambda: steady(300, update_lost=every(50, norms(0.9, 0.2, 0.1))), False, "one-of-three"),
    case("updates_rounded_away", lambda: steady(300, update_lost=lambda s: norms(1, 1, 1) if s == 50 else norms(0, 0, 0)), False, "once"),
    case("updates_rounded_away", lambda: steady(300, lr=0.0, update_lost=every(50, norms(1, 1, 1))), False, "no-learning-rate"),
    case("dead", lambda: [make_record(s, HOLLOW, loss=STUCK, grad_norm=norms(0, 1, 1)) for s in range(60)], False, "a-weight-without-elements"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "records", "expected", "settings"), CASES)
def test_rule_flags_what_it_must_and_nothing_else(rule: str, records: Records, expected: bool, settings: Any) -> None:
    found = run(RULES[rule](**settings), records(), finish=True)
    assert bool(found) is expected, found
    for incident in found:
        assert incident.rule == rule
        assert incident.message
        assert "{" not in incident.message
        assert not re.search(r"\bnan\b", incident.message), "a number that nobody has"


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


def test_a_rise_behind_one_bad_batch_says_so() -> None:
    losses = {**dict.fromkeys(range(40), 2.0), 40: 3e4}
    large = lambda s: norms(1 if s < 40 else 100)  # noqa: E731
    (incident,) = run(RULES["diverging"](), steady(120, loss=lambda s: losses.get(s, 200.0), grad_norm=large))
    assert "at step 40 one batch had 1.5e+04 times the usual loss" in incident.message
    (stays,) = run(RULES["diverging"](), steady(120, loss=lambda s: losses.get(s, 3e4), grad_norm=large))
    assert "one batch" not in stays.message


@pytest.mark.parametrize(
    ("lr", "expected"),
    [
        pytest.param(lambda s: 1e-9 * (s + 1), "still rises: its warm-up is not over", id="warm-up"),
        pytest.param(lambda s: 1e-3 if s < 50 else 1e-6, "because the learning rate (1e-06) is 0.001", id="decayed"),
        pytest.param(1e-7, "at a learning rate of 1e-07", id="constant"),
    ],
)
def test_updates_that_are_too_small_say_what_the_learning_rate_has_to_do_with_it(lr: Any, expected: str) -> None:
    records = steady(300, loss=STUCK, lr=lr, update_ratio=every(50, norms(1e-7, 1e-7, 1e-7)))
    (incident,) = run(RULES["update_too_small"](), records)
    assert expected in incident.message


def test_updates_that_are_too_small_for_a_clip_say_so() -> None:
    clipped = {"global_norm": 1.3, "global_norm_applied": 1e-5}
    records = steady(300, loss=STUCK, lr=0.1, update_ratio=every(50, norms(1e-7, 1e-7, 1e-7)), **clipped)
    (incident,) = run(RULES["update_too_small"](), records)
    assert "because gradients are clipped from a norm of 1.3 to 1e-05" in incident.message
    (stuck,) = run(RULES["not_learning"](), steady(320, loss=STUCK, lr=0.1, **clipped))
    assert "gradients are clipped from a norm of 1.3 to 1e-05" in stuck.message
    size = every(50, lambda s: norms(*[0.99**s] * 3))
    decays = {"weight_decay": 0.01, "param_norm": size, "update_norm": every(50, norms(1, 1, 1))}
    (decayed, *_) = run(
        RULES["weight_decay_too_large"](),
        steady(320, loss=STUCK, lr=0.1, grad_norm=norms(1e-4, 1e-4, 1e-4), **decays, **clipped),
    )
    assert "because gradients are clipped from a norm of 1.3 to 1e-05" in decayed.message


def test_exploding_names_the_layers_that_left_their_level_the_last_one_first() -> None:
    records = steady(60, grad_norm=lambda s: norms(1, *((1000, 1000) if s == 50 else (1, 1))))
    (incident,) = run(RULES["exploding"](), records)
    assert (incident.first_step, incident.first_path) == (50, "c.weight")
    assert incident.paths == ("c.weight", "b.weight")
