"""The engine: the life of an alert, grouping, inhibition, silences, budgets, errors, coverage, memory."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradwatch import ConfigError, GradwatchWarning
from gradwatch.records import Finding, StepRecord
from gradwatch.rules import (
    RULES,
    Exploding,
    Expression,
    NonFinite,
    NotLearning,
    Rule,
    RuleBook,
    RuleEngine,
    Silence,
    format_findings,
)

from .series import INDEX, PARAMETERS, make_index, make_record, norms, run


class High(Rule):
    """Fires at paths whose gradient norm is above 1."""

    needs = frozenset({"grad_norm"})

    def judge(self, record: StepRecord, state: Any) -> tuple[Any, Any]:
        if "grad_norm" not in record.columns:
            return self.unjudged(record, "no norms"), state
        values, judged = record.columns["grad_norm"], record.measured("grad_norm")
        with np.errstate(invalid="ignore"):
            return self.over(record, judged & (values > 1), judged, values, 1.0), state


class Low(High):
    """The same condition under another name."""


class Treats:
    name = "treats"

    def apply_(self, grads: Any, context: Any) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


class Acts:
    name = "acts"

    def act(self, incident: Any, context: Any) -> None: ...


def series(values: Sequence[float | None], every: int = 1) -> list[StepRecord]:
    """One path; None: not measured."""
    return [make_record(i * every, **({} if v is None else {"grad_norm": norms(v)})) for i, v in enumerate(values)]


LIVES = [
    pytest.param({}, [0, 2, 0, 0], 1, [(1, 2)], id="fires-at-once-and-resolves"),
    pytest.param({"for_steps": 3}, [2, 2, 0, 2, 2, 2, 0], 1, [(5, 6)], id="pending-is-reset-by-a-false-judgement"),
    pytest.param({"for_steps": 1}, [2], 1, [(0, None)], id="one-judgement-is-enough-for-one-step"),
    pytest.param({"for_steps": 20}, [2, 2], 50, [(50, None)], id="for-counts-steps-not-judgements"),
    pytest.param({"for_steps": 2}, [2, 0], 50, [], id="for-takes-two-judgements-at-least"),
    pytest.param({"for_steps": 3}, [2, None, 2], 1, [(2, None)], id="an-unmeasured-step-neither-counts-nor-clears"),
    pytest.param({"keep_firing_for": 2}, [2, 0, 0, 0, 0], 1, [(0, 3)], id="keeps-firing-after-it-clears"),
    pytest.param({"keep_firing_for": 3}, [2, 0, 2, 0, 0, 0, 0], 1, [(0, 6)], id="a-flap-is-one-incident"),
    pytest.param({"cooldown": 0}, [2, 0, 2, 0], 1, [(0, 1), (2, 3)], id="without-cooldown-each-is-its-own"),
    pytest.param({"cooldown": 10}, [2, 0, 2, 0], 1, [(0, 3)], id="within-the-cooldown-it-is-the-same-incident"),
    pytest.param({"warmup": 3}, [2, 2, 2, 2], 1, [(3, None)], id="warm-up-counts-steps-from-the-first-seen"),
    pytest.param({"max_fires": 1, "cooldown": 0}, [2, 0, 2, 0], 1, [(0, 1)], id="max-fires-bounds-incidents"),
]


@pytest.mark.parametrize(("settings", "values", "every", "expected"), LIVES)
def test_an_alert_lives_as_in_prometheus(settings: Any, values: Any, every: int, expected: Any) -> None:
    found = run(High(**{"keep_firing_for": 0, "cooldown": 0, **settings}), series(values, every))
    assert [(i.first_step, i.resolved_step) for i in found] == expected


def test_warmup_counts_from_the_first_record_not_from_zero() -> None:
    rule = High(warmup=3)
    found = run(rule, [make_record(1000 + s, grad_norm=norms(2.0)) for s in range(5)])
    assert [i.first_step for i in found] == [1003]


def test_paths_are_grouped_to_one_incident_that_begins_in_the_rules_order() -> None:
    class Backward(High):
        order = "backward"

    records = [make_record(0, grad_norm=norms(0, 2, 3)), make_record(1, grad_norm=norms(5, 2, 3))]
    (forward,) = run(High(), records)
    assert (forward.first_path, forward.paths, forward.count) == ("b.weight", ("b.weight", "c.weight", "a.weight"), 2)
    assert (forward.value, forward.limit) == (5.0, 1.0)
    (backward,) = run(Backward(), records)
    assert (backward.first_path, backward.paths) == ("c.weight", ("c.weight", "b.weight", "a.weight"))


def test_a_number_that_is_printed_is_that_of_the_path_it_is_printed_for() -> None:
    records = [make_record(0, grad_norm=norms(0, 2, 3)), make_record(1, grad_norm=norms(5, 2, 3))]
    (incident,) = run(High(), records)
    assert (incident.first_path, incident.worst_path, incident.value) == ("b.weight", "a.weight", 5.0)
    assert incident.worst_elsewhere == "a.weight"
    assert "in b.weight and 2 more (a.weight: 5, limit 1)" in str(incident)
    (begun,) = run(High(), records[:1])
    assert (begun.worst_path, begun.value) == ("c.weight", 3.0)
    (alone,) = run(High(), [make_record(0, grad_norm=norms(0, 2, 0))])
    assert (alone.first_path, alone.worst_path, alone.worst_elsewhere) == ("b.weight", "b.weight", "")
    assert "in b.weight (2, limit 1)" in str(alone)
    told = replace(incident, message="five", first_path="c.weight")
    assert told.seen == "a.weight: five"
    assert replace(told, worst_path="").seen == "five"
    assert replace(told, value=float("nan")).seen == "five"


def test_paths_setting_restricts_by_glob() -> None:
    (found,) = run(Expression("grad_norm > 1", paths=["b.*"]), [make_record(0, grad_norm=norms(2, 2, 2))])
    assert found.paths == ("b.weight",)


@pytest.mark.parametrize(
    ("inhibits", "expected"),
    [
        pytest.param(None, {"high", "low"}, id="both-speak"),
        pytest.param({"high": "low"}, {"high"}, id="one-silences-the-other"),
        pytest.param({"high": "*"}, {"high"}, id="star-is-all-others"),
        pytest.param({"high": "low", "low": "high"}, {"high"}, id="of-two-the-first-speaks"),
    ],
)
def test_inhibition(inhibits: Any, expected: set[str]) -> None:
    book = RuleBook([High(), Low()], inhibits=inhibits)
    assert {i.rule for i in run(book, series([2, 2]))} == expected


def test_a_muted_rule_silences_nobody() -> None:
    book = RuleBook([High(), Low(), High(name="third")], inhibits={"high": ["low"], "low": ["third"]})
    assert {i.name for i in run(book, series([2]))} == {"high", "third"}


def test_inhibited_rule_speaks_once_the_inhibition_ends() -> None:
    first = High(name="first", paths="a.*", keep_firing_for=0, inhibits=["second"], inhibit_for=3)
    first = Expression(
        "grad_norm > 1 and step < 2", name="first", keep_firing_for=0, inhibits=["second"], inhibit_for=3
    )
    found = run([first, High(name="second")], series([2] * 8))
    assert [(i.name, i.first_step) for i in found] == [("first", 0), ("second", 5)]


def test_silence_by_annotation_covers_rules_and_paths_until_it_ends() -> None:
    engine = RuleEngine(RuleBook([High(keep_firing_for=0)]))
    engine.judge(make_record(0, grad_norm=norms(0)))
    engine.annotate("data switch", silence=3, paths="a.*", rules="hi*")
    opened = [engine.judge(make_record(s, grad_norm=norms(2, 0))).opened for s in range(1, 6)]
    assert [len(o) for o in opened] == [0, 0, 0, 1, 0]
    assert engine.annotations == [(1, "data switch")]
    engine = RuleEngine(RuleBook([High()], silences=[Silence(paths=["a.*"])]))
    assert engine.judge(make_record(0, grad_norm=norms(2, 2))).opened[0].paths == ("b.weight",)


def test_treatments_run_at_every_firing_step_and_actions_when_it_begins() -> None:
    engine = RuleEngine(RuleBook([High(then=[Treats(), Acts()], keep_firing_for=0)]))
    then = []
    for record in series([2, 2, 0, 2]):
        fired = engine.judge(record).fired
        then.append([t.name for f in fired for t in f.then])
    assert then == [["treats", "acts"], ["treats"], [], ["treats", "acts"]]


def test_actions_have_a_budget_and_treatments_have_none() -> None:
    rule = High(then=[Treats(), Acts()], keep_firing_for=0, max_actions=2, action_window=10)
    engine = RuleEngine(RuleBook([rule]))
    acts, treats = [], []
    for record in series([2, 0] * 8):
        for fired in engine.judge(record).fired:
            names = [t.name for t in fired.then]
            acts += [record.step] * ("acts" in names)
            treats += [record.step] * ("treats" in names)
    assert acts == [0, 2, 10, 12]
    assert treats == [0, 2, 4, 6, 8, 10, 12, 14]


def test_escalation_logs_then_treats_then_stops() -> None:
    engine = RuleEngine(RuleBook([High(then=Treats(), treat_after=2, stop_after=4)]))
    seen = [engine.judge(r).fired[0] for r in series([2, 2, 2, 2])]
    assert [(len(f.then), f.stop) for f in seen] == [(0, False), (1, False), (1, False), (1, True)]


def test_treatments_are_noted_on_the_going_incident() -> None:
    engine = RuleEngine(RuleBook([High()]))
    engine.judge(series([2])[0])
    engine.note_treatments("high", ["scale", "scale"])
    engine.note_details("high", {"file": "x.json"}, first_path="b")
    assert engine.incidents[0].treatments == ("scale",)
    assert (engine.incidents[0].details, engine.incidents[0].first_path) == ({"file": "x.json"}, "b")


class Broken(Rule):
    def judge(self, record: StepRecord, state: Any) -> tuple[Any, Any]:
        if record.step >= 2:
            raise ZeroDivisionError("oh")
        return self.clear(record), state


def test_a_rule_that_raises_becomes_one_warning_and_is_disabled() -> None:
    engine = RuleEngine(RuleBook([Broken(), High()]))
    engine.judge(make_record(0, grad_norm=norms(0)))
    with pytest.warns(GradwatchWarning, match="rule 'broken' raised ZeroDivisionError at step 2 and is disabled: oh"):
        engine.judge(make_record(2, grad_norm=norms(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.judge(make_record(3, grad_norm=norms(2)))
    assert [i.rule for i in engine.incidents] == ["high"]
    assert engine.coverage()[0].disabled
    with pytest.raises(ZeroDivisionError):
        run(Broken(), series([0, 0, 0]))


def test_coverage_says_how_often_a_rule_was_judged_and_why_not() -> None:
    engine = RuleEngine(RuleBook([High(), NotLearning()]))
    for record in series([0, None, 0]):
        engine.judge(record)
    high, learning = engine.coverage()
    assert (high.judged, high.reason) == (2, "no norms")
    assert (learning.judged, learning.reason) == (0, "no finite loss was given")


def test_a_rule_of_ones_own_may_return_plain_findings() -> None:
    class Mine:
        name, severity, then, rule_name = "mine", "critical", (), "mine"

        def init(self) -> int:
            return 0

        def judge(self, record: StepRecord, state: int) -> tuple[list[Finding], int]:
            found = [
                Finding(rule="mine", step=record.step, path="b.weight", value=state, limit=1, message="too {much}")
            ]
            return (found if state > 1 else []), state + 1

        def limit(self, state: int) -> None:
            return None

    (incident,) = run(Mine(), series([0] * 4))
    assert (incident.first_path, incident.value, incident.message) == ("b.weight", 3.0, "too {much}")
    assert incident.count == 2


def everything() -> RuleBook:
    return RuleBook(
        [cls() for name, cls in RULES.items() if name != "expression"]
        + [
            Expression("grad_norm > 3 * median(grad_norm, 20)", name="spike", for_steps=2),
            Expression("rate(loss, 5) > 0.05 or ema(loss, 10) > 3", name="rise"),
        ]
    )


def wild(num: int, seed: int = 0) -> list[StepRecord]:
    """Records in which many things go wrong now and then."""
    rng = np.random.default_rng(seed)
    records = []
    for s in range(num):
        g = np.exp(rng.normal(scale=0.3, size=3)) * (1000 if s % 61 == 60 else 1)
        if s % 97 == 50:
            g[1] = np.nan
        if 200 < s < 330:
            g[0] *= 1e-6
        given: dict[str, Any] = {"grad_norm": norms(*g), "loss": 1 + 0.1 * rng.normal() + (5 if s % 40 > 35 else 0)}
        if s % 10 == 0:
            given |= {"update_ratio": norms(0.5, 1e-3, 1e-9), "update_norm": norms(1, 0, 1)}
            given |= {"silent_fraction": {"a": 0.95}, "output_batch_variance": 0.0, "batch_size": 8}
        if s == 150:
            given["lr"] = 0.0
        records.append(make_record(s, **given))
    return records


@pytest.mark.parametrize("at", [1, 73, 150, 260])
def test_going_on_after_a_reload_gives_the_same_incidents(at: int) -> None:
    import io

    import torch

    records = wild(400)
    whole = RuleEngine(everything(), on_error="raise")
    for record in records:
        whole.judge(record)
    first = RuleEngine(everything(), on_error="raise")
    for record in records[:at]:
        first.judge(record)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = RuleEngine(everything(), on_error="raise")
    second.load_state_dict(torch.load(file, weights_only=True))
    for record in records[at:]:
        second.judge(record)
    assert len(whole.incidents) > 5
    assert list(map(repr, second.incidents)) == list(map(repr, whole.incidents))
    assert second.limits() == whole.limits()


def test_early_and_late_phases_come_to_the_same_as_one() -> None:
    together, apart = RuleEngine(everything()), RuleEngine(everything())
    for record in wild(200):
        together.judge(record)
        apart.judge(record, "early")
        apart.judge(record, "late")
    assert list(map(repr, together.incidents)) == list(map(repr, apart.incidents))


def test_judging_does_not_change_the_state_it_was_given() -> None:
    for rule in everything():
        state = rule.init()
        for record in wild(120):
            before = pickle.dumps(state)
            _, after = rule.judge(record, state)
            assert pickle.dumps(state) == before, rule.name
            state = after


def test_memory_follows_paths_when_the_index_changes() -> None:
    rule = Expression("grad_norm > 5 * median(grad_norm, 20)", keep_firing_for=0)
    engine = RuleEngine(RuleBook([rule, Exploding()]), on_error="raise")
    for s in range(30):
        engine.judge(make_record(s, grad_norm=norms(1, 10, 100)))
    smaller = make_index(("c.weight", "a.weight"), ())
    judgement = engine.judge(make_record(30, smaller, grad_norm={"c.weight": 100, "a.weight": 90}))
    assert [f.path for f in judgement.findings] == ["a.weight"]


def test_findings_of_ten_thousand_paths_are_made_only_when_asked_for() -> None:
    index = make_index([f"l{i}.weight" for i in range(10_000)], ())
    column = dict.fromkeys(index.paths, 2.0)
    judgement = RuleEngine(RuleBook([High()])).judge(make_record(0, index, grad_norm=column))
    assert len(judgement.findings) == 10_000
    assert judgement.findings[-1].path == "l9999.weight"
    assert len(judgement.opened[0].paths) == 10_000
    assert format_findings(judgement.findings, 1).splitlines() == [
        "step 0, l0.weight: high (2, limit 1)",
        "... and 9999 more",
    ]


def test_a_book_knows_what_its_rules_need() -> None:
    book = RuleBook([NonFinite(), Expression("max_over(update_ratio) > 1 and loss > 2", name="x")])
    assert {"grad_norm", "output_nonfinite", "update_ratio", "loss"} <= book.needs
    assert "x" in book
    assert len(book) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: RuleBook([Exploding]), "a RuleBook takes rules, such as Exploding().", id="class"),
        pytest.param(lambda: RuleBook([Exploding(), Exploding()]), "two rules are named 'exploding'.", id="twice"),
        pytest.param(
            lambda: RuleBook([], inhibits={"explodin": "*"}), "inhibits: there is no rule 'explodin'.", id="inhibits"
        ),
        pytest.param(lambda: RuleBook([])["x"], "there is no rule 'x'.", id="getitem"),
        pytest.param(lambda: RuleEngine(RuleBook([]), on_error="skip"), "`on_error` must be", id="on-error"),
        pytest.param(lambda: Exploding(ratio=-1), "`ratio` of 'exploding' must be above 1. Got -1.", id="ratio"),
        pytest.param(lambda: Exploding(z=float("nan")), "`z` of 'exploding' must be above 0. Got nan.", id="nan"),
        pytest.param(lambda: Exploding(severity="bad"), "rule 'exploding': there is no severity 'bad'.", id="severity"),
        pytest.param(
            lambda: Exploding(for_steps=-1), "`for_steps` of 'exploding' must be at least 0. Got -1.", id="for"
        ),
        pytest.param(lambda: Exploding(paths=""), "`paths` of 'exploding' must be one glob pattern", id="paths"),
        pytest.param(
            lambda: Exploding(then=3), "`then` of 'exploding' takes treatments and actions. Got 3.", id="then"
        ),
    ],
)
def test_what_can_not_be_is_an_error_at_once(make: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value)


def test_rules_are_frozen_and_set_up_by_name() -> None:
    rule = Exploding(ratio=20, paths="a.*", labels={"team": "x"})
    with pytest.raises(AttributeError):
        rule.ratio = 3  # type: ignore[misc]
    assert (rule.name, rule.rule_name, rule.paths, rule.ratio) == ("exploding", "exploding", ("a.*",), 20)
    assert INDEX.paths[:3] == PARAMETERS


@pytest.mark.parametrize("resumed", [False, True])
def test_what_is_said_at_the_end_of_a_run_knows_the_learning_rate_it_had(resumed: bool) -> None:
    class Last(Rule):
        needs = frozenset({"loss", "end_of_run"})

        def judge(self, record: StepRecord, state: Any) -> tuple[Any, Any]:
            ended = record.scalars.get("end_of_run", 0.0) > 0
            return self.whole(record, ended, record.lr, 0.0, "the learning rate is {value:.2g}"), state

    def engine() -> RuleEngine:
        return RuleEngine(RuleBook([Last()]), on_error="raise")

    first = second = engine()
    for s in range(3):
        first.judge(make_record(s, loss=1.0, lr=0.01 * (s + 1)))
    if resumed:
        second = engine()
        second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
        second.judge(make_record(3, loss=1.0, lr=float("nan")))
    (incident,) = second.finish(4)
    assert "the learning rate is 0.03" in incident.message
