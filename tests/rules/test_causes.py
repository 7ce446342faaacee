"""The graph of causes, and the order into which it puts a run's incidents."""

import pytest

from gradwatch.records import LEADS_TO, Incident, consequences, rank_incidents
from gradwatch.rules import RULES


def incident(rule: str, step: int, severity: str = "warning") -> Incident:
    return Incident(rule=rule, first_step=step, last_step=step, severity=severity, id=step)


def test_nothing_is_a_cause_of_itself_at_any_remove() -> None:
    assert [rule for rule in LEADS_TO if rule in consequences(rule)] == []


def test_every_cause_and_consequence_is_a_rule_of_the_catalogue() -> None:
    assert {*LEADS_TO, *(name for follows in LEADS_TO.values() for name in follows)} <= set(RULES)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(
            [("not_learning", 299), ("exploding", 20), ("unnormalised_input", 2)],
            [("unnormalised_input", ""), ("exploding", "unnormalised_input"), ("not_learning", "unnormalised_input")],
            id="one-root-two-consequences",
        ),
        pytest.param(
            [("not_learning", 100), ("update_too_small", 200)],
            [("update_too_small", ""), ("not_learning", "update_too_small")],
            id="a-cause-that-was-found-later",
        ),
        pytest.param(
            [("not_learning", 100), ("update_too_small", 5000)],
            [("not_learning", ""), ("update_too_small", "")],
            id="long-after-is-no-cause",
        ),
        pytest.param(
            [("vanishing", 148), ("update_too_large", 150), ("not_learning", 299)],
            [("vanishing", ""), ("update_too_large", "vanishing"), ("not_learning", "vanishing")],
            id="a-chain-stands-under-its-root",
        ),
        pytest.param(
            [("not_learning", 5), ("vanishing", 5), ("unnormalised_input", 5), ("constant_output", 5)],
            [
                ("unnormalised_input", ""),
                ("vanishing", "unnormalised_input"),
                ("constant_output", "unnormalised_input"),
                ("not_learning", "unnormalised_input"),
            ],
            id="those-that-began-together-in-the-order-of-causes",
        ),
        pytest.param(
            [("eval_mode", 2), ("targets_shifted", 3), ("overfit", 100)],
            [("eval_mode", ""), ("overfit", "eval_mode"), ("targets_shifted", "")],
            id="two-causes-the-earlier-one-leads",
        ),
    ],
)
def test_each_stands_behind_what_it_follows_from(given: list, expected: list) -> None:
    ranked = rank_incidents([incident(rule, step) for rule, step in given])
    assert [(r.incident.rule, "" if r.cause is None else r.cause.rule) for r in ranked] == expected


def test_what_is_only_worth_knowing_comes_last_and_causes_nothing() -> None:
    ranked = rank_incidents([incident("vanishing", 1, "info"), incident("not_learning", 300), incident("mine", 5)])
    assert [(r.incident.rule, r.cause) for r in ranked] == [("mine", None), ("not_learning", None), ("vanishing", None)]
