"""The spike rules on noise, and on the published steps of a real run that exploded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gradwatch.rules import Exploding, LossSpike

from .series import make_index, make_record

INDEX = make_index((), ())
BLOOM_LOSS = [2.199, 2.220, 2.595, 2.242, 2.345, 5.098, 3.492, 3.213, 2.805]
BLOOM_NORM = [0.242, 0.947, 2.390, 15.886, 145.1, 960.4, 353.2, 379.3, 650.2]


def noise(kind: str, num: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    if kind == "gaussian":
        return rng.normal(size=num)
    if kind == "t4":
        return rng.standard_t(4, size=num)
    shocks, series = rng.normal(size=num) * math.sqrt(1 - 0.7**2), np.zeros(num)
    for i in range(1, num):
        series[i] = 0.7 * series[i - 1] + shocks[i]
    return series


def false_alarms(rule: Any, values: Any, name: str) -> int:
    state, count = rule.init(), 0
    for step, value in enumerate(values):
        findings, state = rule.judge(make_record(step, INDEX, **{name: float(value)}), state)
        count += bool(len(findings))
    return count


@pytest.mark.parametrize("num", [4_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["gaussian", "t4", "ar"])
def test_at_most_one_false_alarm_in_ten_thousand_clean_steps(kind: str, num: int) -> None:
    z = noise(kind, num)
    assert false_alarms(Exploding(), np.exp(0.2 * z), "global_norm") <= num / 10_000
    assert false_alarms(LossSpike(), 2.2 + 0.04 * z, "loss") <= num / 10_000


def test_bloom_is_caught_on_the_norm_three_steps_before_its_loss_explodes() -> None:
    explodes = BLOOM_LOSS.index(max(BLOOM_LOSS))
    for seed in range(20):
        rule = Exploding()
        state, first = rule.init(), None
        for step, norm in enumerate([*(0.242 * np.exp(0.2 * noise("gaussian", 256, seed))), *BLOOM_NORM]):
            findings, state = rule.judge(make_record(step, INDEX, global_norm=float(norm)), state)
            first = step - 256 if first is None and len(findings) else first
        assert first is not None
        assert explodes - first >= 3


def test_the_limit_lies_between_what_is_usual_and_what_is_flagged() -> None:
    rule = Exploding()
    state = rule.init()
    assert rule.limit(state) is None
    for step, value in enumerate(np.exp(0.2 * noise("gaussian", 200))):
        _, state = rule.judge(make_record(step, INDEX, global_norm=float(value)), state)
    limit = rule.limit(state)
    assert limit is not None
    assert 2 < limit < 10
    accepted, _ = rule.judge(make_record(200, INDEX, global_norm=0.99 * limit), state)
    assert not len(accepted)


def test_a_level_that_stays_becomes_the_level() -> None:
    rule, hits = Exploding(patience=30), []
    state = rule.init()
    for step in range(300):
        norm = (1.0 if step < 100 else 100.0) * (1 + 0.1 * (step % 3))
        findings, state = rule.judge(make_record(step, INDEX, global_norm=norm), state)
        hits += [step] * bool(len(findings))
    assert (hits[0], hits[-1]) == (100, 129)


@pytest.mark.parametrize("again", [False, True], ids=["alone", "twice-running"])
def test_a_flagged_norm_never_enters_the_window_and_a_suspicious_one_that_nothing_followed_does(again: bool) -> None:
    rule = Exploding()
    state = rule.init()
    usual = [1 + 0.1 * (step % 3) for step in range(100)]
    for step, norm in enumerate(usual):
        _, state = rule.judge(make_record(step, INDEX, global_norm=norm), state)
    limit, alarm = rule.limit(state), rule.alarm(state)
    assert limit is not None
    assert alarm is not None
    suspicious, flagged = (1.01 * limit, 1.02 * limit) if again else (1.01 * limit, 2 * alarm)
    series = [suspicious, flagged, 1.0] if again else [suspicious, 1.0, flagged, 1.0]
    hits = []
    for step, norm in enumerate(series, 100):
        findings, state = rule.judge(make_record(step, INDEX, global_norm=norm), state)
        hits += [norm] * bool(len(findings))
    assert hits == [flagged]
    assert math.log(flagged) not in state["window"]
    assert state["window"].count(math.log(suspicious)) == (0 if again else 1)
