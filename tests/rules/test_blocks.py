"""Judging records together comes to what judging them one after another does: memories, incidents, coverage."""

import math
from dataclasses import replace

import numpy as np
import pytest

from gradwatch import load_rules
from gradwatch.records import Index, StepRecord
from gradwatch.rules import RULES, Expression, Judgement, RuleBook, RuleCoverage, RuleEngine
from gradwatch.rules._windows import Ordered, Progress, median, progress, progress_over, stream, stream_over
from gradwatch.testing import odd_records

PATHS = ("0.weight", "0.bias", "2.weight", "2.bias", "0", "1", "2")
INDEX = Index(
    paths=PATHS,
    kinds=("parameter",) * 4 + ("module",) * 3,
    numel=np.array([20, 5, 15, 3, 0, 0, 0]),
    shapes=((5, 4), (5,), (3, 5), (3,), (), (), ()),
    depth=np.array([0, 0, 2, 2, 0, 1, 2]),
    types=("Linear",) * 4 + ("Linear", "ReLU", "Linear"),
    in_optimizer=np.array([True] * 4 + [False] * 3),
)


def ordinary(step: int, random: np.random.Generator) -> StepRecord:
    grads = np.where(INDEX.is_parameter, np.exp(0.2 * random.normal(size=7)), np.nan)
    norm = float(np.sqrt(np.nansum(grads**2)))
    scalars = {"seconds": 0.01, "num_trainable": 4.0, "grads_kept": 0.0}
    columns, masks = {"grad_norm": grads}, {"grad_norm": INDEX.is_parameter}
    if step % 50 == 0:
        updates = np.where(INDEX.is_parameter, 1e-3 * np.exp(random.normal(size=7)), np.nan)
        columns |= {"update_norm": updates, "update_ratio": updates, "param_norm": np.ones(7)}
        masks |= dict.fromkeys(("update_norm", "update_ratio", "param_norm"), INDEX.is_parameter)
        columns["silent_fraction"] = np.where(INDEX.is_module, 0.3 * random.random(7), np.nan)
        masks["silent_fraction"] = INDEX.is_module
        scalars |= {"output_batch_variance": 1.0, "output_min": -1.0, "output_max": 1.0, "batch_size": 16.0}
    if step % 70 == 69:
        scalars["val_loss"] = 2.0 * math.exp(-step / 300)
    loss = 2.0 * math.exp(-step / 300) + 0.1 * random.normal()
    return StepRecord(
        step=step, index=INDEX, loss=loss, lr=1e-3, num_samples=16, global_norm=norm, columns=columns, masks=masks,
        scalars=scalars,
    )  # fmt: skip


def spiky(record: StepRecord, random: np.random.Generator) -> StepRecord:
    """One of the things that go wrong, at one step."""
    kind = int(random.integers(9))
    if kind == 0:
        return replace(record, global_norm=1e3 * record.global_norm)
    if kind == 1:
        return replace(record, loss=math.nan)
    if kind == 2:
        return replace(record, loss=record.loss + 50.0)
    if kind == 3:
        bad = np.where(INDEX.is_parameter, np.nan, record.columns["grad_norm"])
        return replace(record, global_norm=math.nan, columns={**record.columns, "grad_norm": bad})
    if kind == 4:
        dead = np.where(np.arange(7) == 0, 0.0, record.columns["grad_norm"])
        return replace(record, columns={**record.columns, "grad_norm": dead})
    if kind == 5:
        tiny = np.where(np.arange(7) == 0, 1e-9, record.columns["grad_norm"])
        return replace(record, columns={**record.columns, "grad_norm": tiny})
    if kind == 6:
        return replace(record, scalars={**record.scalars, "grads_kept": 1.0, "seconds": 1e5})
    if kind == 7:
        return replace(record, columns={}, masks={}, has_loss=False, scalars={})
    return replace(record, scalars={**record.scalars, "amp_overflow": 1.0, "grad_scale": 0.5, "task_cos/a/b": -0.5})


def series(seed: int, steps: int = 450) -> list[StepRecord]:
    random = np.random.default_rng(seed)
    records = [ordinary(step, random) for step in range(steps)]
    for start in random.integers(0, steps, size=int(seed % 4) * 3).tolist():
        for step in range(start, min(steps, start + int(random.choice([1, 1, 2, 30])))):
            records[step] = spiky(ordinary(step, random), random)
    end = StepRecord(step=steps, index=INDEX, has_loss=False, scalars={"end_of_run": 1.0})
    return [*records, end]


def in_blocks(engine: RuleEngine, records: list[StepRecord], size: int) -> list[Judgement]:
    said: list[Judgement] = []
    for start in range(0, len(records), size):
        block = records[start : start + size]
        said.extend(engine.judge_all(block))
    return said


def book(*names: str) -> RuleBook:
    return RuleBook([RULES[name]() for name in names])


def counted(engine: RuleEngine) -> list[RuleCoverage]:
    """What each rule has judged; which part of the run a judgement in a block falls into is not told."""
    return [replace(coverage, strip=()) for coverage in engine.coverage()]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [3, 16])
def test_blocks_come_to_the_same_as_single_records(seed: int, size: int) -> None:
    records = series(seed)
    one, many = (RuleEngine(load_rules("thorough"), on_error="raise") for _ in range(2))
    singly = [one.judge(record) for record in records]
    together = in_blocks(many, records, size)
    assert repr(many.state_dict()) == repr(one.state_dict())  # nan is equal to itself
    assert [str(i) for i in many.incidents] == [str(i) for i in one.incidents]
    assert counted(many) == counted(one)
    for alone, within in zip(singly, together, strict=True):
        assert [f.rule.name for f in within.fired] == [f.rule.name for f in alone.fired]
        assert [str(i) for i in within.opened] == [str(i) for i in alone.opened]
        assert [f.path for f in within.findings] == [f.path for f in alone.findings]


@pytest.mark.parametrize("name", sorted(set(RULES) - {"expression"}))
def test_each_rule_passes_over_nothing_that_it_would_find(name: str) -> None:
    for seed in range(3):
        for records in (series(seed, 160), [replace(r, index=INDEX) for r in odd_records(seed=seed)]):
            one, many = RuleEngine(book(name), on_error="raise"), RuleEngine(book(name), on_error="raise")
            for record in records:
                one.judge(record)
            in_blocks(many, records, 5)
            assert repr(many.state_dict()) == repr(one.state_dict())  # nan is equal to itself
            assert counted(many) == counted(one)


def test_a_rule_that_raises_is_disabled_at_its_own_record() -> None:
    class Picky(RULES["stalled"]):  # type: ignore[misc, valid-type]
        def judge(self, record, state):
            raise ZeroDivisionError(record.step)

    engine = RuleEngine(RuleBook([Picky(), Expression("loss > 1e9", name="never")]))
    with pytest.warns(UserWarning, match="at step 0"):
        in_blocks(engine, series(0, 20), 5)
    assert [c.disabled for c in engine.coverage()] == [True, False]


def test_a_level_kept_in_order_is_that_of_the_window() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        window = tuple(random.choice([-1.0, 0.0, 2.0, *random.normal(size=3)], size=int(random.integers(1, 20))))
        ordered = Ordered(window)
        if len(window) > 1:
            new = float(random.normal())
            ordered.replace(window[0], new)
            window = (*window[1:], new)
        center, sigma, size = ordered.level(0.0)
        assert (center, size) == (median(window), len(window))
        assert sigma == 1.4826 * median(tuple(abs(v - center) for v in window))


def test_losses_and_levels_move_over_many_records_as_over_one_after_another() -> None:
    random = np.random.default_rng(1)
    losses = [math.nan if random.random() < 0.1 else float(x) for x in random.normal(size=200)]
    for size in (1, 3, 64):
        one = many = Progress()
        for start in range(0, 200, size):
            many = progress_over(many, losses[start : start + size], [8] * len(losses[start : start + size]))
        for loss in losses:
            one = progress(one, loss, 8)
        assert many == one
    values = random.normal(size=(16, 5))
    for accept in (np.ones((16, 5), bool), random.random((16, 5)) < 0.7):
        past = np.array([0.0, 1.0, np.nan, 2.0, 3.0])
        want = past
        for value, accepted in zip(values, accept, strict=True):
            want = stream(want, value, 0.9, accepted)
        np.testing.assert_array_equal(stream_over(past, values, 0.9, accept), want)


def test_an_ordinary_run_is_not_judged_record_by_record() -> None:
    asked = []

    class Counting(RULES["exploding"]):  # type: ignore[misc, valid-type]
        def judge(self, record, state):
            asked.append(record.step)
            return super().judge(record, state)

    in_blocks(RuleEngine(RuleBook([Counting()])), series(0), 16)
    assert len(asked) < 100, "after the first baseline it is asked about blocks"
