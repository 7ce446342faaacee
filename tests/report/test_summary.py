"""What the words on top of a report say."""

from __future__ import annotations

import inspect

import pytest

from gradwatch import rules
from gradwatch.records import Incident, RuleCoverage, judge_run
from gradwatch.report import EXPLANATIONS, ReportData, TreatmentCount, summarise


def incident(rule: str, step: int, **more: object) -> Incident:
    return Incident(**{"rule": rule, "first_step": step, "last_step": step, **more})  # type: ignore[arg-type]


def well(num_steps: int, *incidents: Incident) -> ReportData:
    """What was recorded of a run that a rule judged step by step."""
    coverage = [RuleCoverage(name="exploding", judged=num_steps)]
    verdict = judge_run(incidents=incidents, coverage=coverage, num_steps=num_steps)
    return ReportData(num_steps=num_steps, incidents=incidents, verdict=verdict)


def story_order(*incidents: Incident) -> list[str]:
    return [s.rule for s in summarise(ReportData(incidents=incidents, num_steps=10)).stories]


def test_every_built_in_rule_is_explained():
    own = ("Rule", "Expression")
    classes = [c for n, c in vars(rules).items() if inspect.isclass(c) and hasattr(c, "judge") and n not in own]
    known = {c.__name__ for c in classes if hasattr(c, "rule_name")}
    names = {"".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_") for name in known}
    assert names - set(EXPLANATIONS) == set()


def test_run_without_incidents_is_healthy():
    summary = summarise(well(1200))
    told = "Healthy: one rule judged 1,200 steps, and none fired."
    assert (summary.state, summary.headline) == ("healthy", told)


def test_run_of_which_nobody_says_what_was_judged_is_not_called_healthy():
    summary = summarise(ReportData(num_steps=1200))
    assert summary.state == "unseen"
    assert summary.headline.startswith("Not enough seen: which rules judged it is not on record.")


def test_run_without_records_is_not_called_healthy():
    assert summarise(ReportData()).headline == "Not enough seen: nothing was recorded."


def test_what_began_first_stands_first():
    assert story_order(incident("not_learning", 90), incident("non_finite", 40), incident("exploding", 38)) == [
        "exploding",
        "non_finite",
        "not_learning",
    ]


def test_of_what_began_together_the_usual_cause_stands_first():
    assert story_order(incident("constant_output", 5), incident("vanishing", 5), incident("unnormalised_input", 5)) == [
        "unnormalised_input",
        "vanishing",
        "constant_output",
    ]


def test_symptom_stands_behind_a_cause_that_is_found_soon_after():
    assert story_order(incident("constant_output", 30), incident("vanishing", 148)) == ["vanishing", "constant_output"]
    assert story_order(incident("constant_output", 30), incident("vanishing", 900)) == ["constant_output", "vanishing"]


def test_what_is_only_worth_knowing_comes_last():
    first, last = summarise(
        ReportData(incidents=(incident("act_scale", 0, severity="info"), incident("dead", 50)), num_steps=99)
    ).stories
    assert (first.rule, first.part, last.rule, last.part) == ("dead", "first", "act_scale", "note")


def test_notes_alone_leave_the_run_healthy():
    summary = summarise(well(100, incident("undertrained", 99, severity="info")))
    assert summary.state == "noted"
    assert summary.headline == "Healthy, with something to know: the loss was still falling at the end."


def test_incidents_of_one_rule_are_one_story():
    (story,) = summarise(
        ReportData(
            incidents=tuple(
                incident("exploding", s, first_path="a", paths=("a", f"b{s}"), resolved=True) for s in (9, 3, 6)
            ),
            num_steps=10,
        )
    ).stories
    assert story.place == "3 times between step 3 and step 9, in a and 3 other paths. It is over."


def test_headline_names_the_first_step_and_the_cause(data):
    told = summarise(data)
    # What exploded at 240 was treated, and is over.
    assert told.headline == "Not healthy since step 300. The likely cause: the gradient vanishes."
    assert told.state == "critical"
    assert (told.stories[0].rule, told.stories[0].part) == ("exploding", "handled")


TREATED = {"treatments": ("clip_to_limit",), "resolved": True}


@pytest.mark.parametrize(
    ("incidents", "since", "cause", "headline"),
    [
        pytest.param(
            [
                incident("exploding", 151, first_path="a", resolved_step=176, **TREATED),
                incident("loss_spike", 152, resolved=True, resolved_step=177),
            ],
            151,
            "exploding",
            "Not healthy since step 151: exploding in a, 1 more after or beside it; over at 177, and nothing was done "
            "about loss_spike.",
            id="what-follows-from-a-handled-cause-was-left",
        ),
        pytest.param(
            [
                incident("exploding", 151, first_path="a", resolved_step=176, **TREATED),
                incident("diverging", 152),
            ],
            151,
            "exploding",
            "Not healthy since step 151: exploding in a, 1 more after or beside it; nothing was done about diverging.",
            id="and-is-not-over",
        ),
        pytest.param(
            [
                incident("exploding", 20, first_path="a", resolved_step=40, **TREATED),
                incident("not_updating", 200, first_path="b", severity="critical"),
            ],
            200,
            "not_updating",
            "Not healthy since step 200: not_updating in b, 1 more after or beside it.",
            id="a-handled-one-that-has-nothing-to-do-with-it",
        ),
        pytest.param(
            [incident("dead", 30, first_path="b"), incident("not_learning", 20)],
            20,
            "dead",
            "Not healthy since step 20: dead in b, 1 more after or beside it.",
            id="a-cause-that-was-found-later",
        ),
    ],
)
def test_headline_and_verdict_name_one_step_and_one_cause(incidents, since, cause, headline):
    data = well(400, *incidents)
    told = summarise(data)
    assert data.verdict is not None
    assert data.verdict.headline == headline
    assert (data.verdict.since, data.verdict.first[0]) == (since, cause)
    (first,) = [s for s in told.stories if s.part == "first"]
    assert first.rule == cause
    title = first.title[0].lower() + first.title[1:]
    assert told.headline == f"Not healthy since step {since}. The likely cause: {title}."


def test_facts_say_what_was_treated(data):
    facts = summarise(data).facts
    assert facts[0] == "GPT: 400 steps recorded, 0 to 399; 52 parameter tensors with 108,160 numbers."
    assert facts[1].startswith("clip_to_limit behind the rule exploding changed 4 steps (first 240, last 243)")
    assert facts[2] == "At 1 step the optimizer was kept from moving anything."


def test_facts_say_that_nothing_was_changed_where_nothing_was():
    assert "No gradient was changed: gradwatch only watched." in summarise(ReportData(num_steps=5)).facts


def test_facts_say_what_gradwatch_itself_took():
    facts = summarise(ReportData(num_steps=1000, overhead_seconds=1.5, total_seconds=100.0)).facts
    assert facts[-1] == "gradwatch itself: 1.5 ms a step, of 0.1 s; 1.5 s in all."


def test_treatment_that_left_little_says_how_little():
    treated = TreatmentCount(name="clip", count=2, first_step=1, last_step=4, least_share=0.05)
    assert (
        "at the strongest 5 % of the norm were left"
        in summarise(ReportData(num_steps=9, treatments=(treated,))).facts[1]
    )


def test_rule_of_ones_own_is_told_by_its_name():
    (story,) = summarise(
        ReportData(incidents=(incident("expression", 3, name="attention-spike"),), num_steps=9)
    ).stories
    assert story.title == "The rule “attention spike” fired"


@pytest.mark.parametrize("rule", sorted(EXPLANATIONS))
def test_explanations_are_whole_sentences(rule):
    said = EXPLANATIONS[rule]
    assert said.meaning.endswith(".")
    assert not said.title.endswith(".")
    assert said.title[0].isupper()
