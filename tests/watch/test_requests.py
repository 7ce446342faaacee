"""What actions ask of the trainer is carried out, or the run is told that it was not."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.errors import ConfigError, GradwatchWarning, TrainingStopped
from gradwatch.records import Incident
from gradwatch.requests import (
    LowerLearningRates,
    Request,
    SaveCheckpoint,
    StopTraining,
    SwitchSurgery,
    TellSomeone,
)
from gradwatch.rules import Rule
from gradwatch.treatments import BaseAction, Checkpoint, Notify, Stop, Surgery

INCIDENT = Incident(rule="exploding", first_step=7, last_step=7)


class Always(Rule):
    """Fires at every step."""

    severity: str = "info"
    needs = frozenset({"loss"})

    def judge(self, record, state):
        return self.whole(record, True, 1.0, 0.0, "always"), state


class Asks(BaseAction):
    """Asks what it is told to ask."""

    def __init__(self, make):
        self.make = make

    def act(self, incident, context):
        context.request(self.make())


class OfMyOwn(Request):
    """Nobody here knows it."""


UNKNOWN = {
    "a-misspelt-kind": lambda: Request(kind="chekpoint", values={"filename": "HELP"}),
    "a-kind-of-old": lambda: Request(kind="stop"),
    "a-class-of-my-own": OfMyOwn,
    "no-request": lambda: "stop",
    "the-class": lambda: StopTraining,
}


def trained(steps=1, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watch(model, optimizer, **options) as watch:
        for _ in range(steps):
            model(torch.eye(4)).square().sum().backward()
            watch.step(loss=1.0)
            optimizer.zero_grad()
    return watch


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_request_is_an_incident_and_the_training_goes_on(make) -> None:
    with pytest.warns(GradwatchWarning, match="action 'asks' failed, training goes on. ConfigError"):
        watch = trained(3, rules=[Always(then=Asks(make))])
    failed = [i for i in watch.incidents if i.rule == "action_failed"]
    assert [i.severity for i in failed] == ["warning"]
    assert "gradwatch.requests" in failed[0].message
    assert watch.num_steps == 3
    assert "action 'asks' failed" in watch.summary()


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_request_raises_where_errors_are_to_be_raised(make) -> None:
    with pytest.raises(ConfigError, match=r"gradwatch\.requests"):
        trained(rules=[Always(then=Asks(make))], on_error="raise")


def test_a_misspelt_kind_is_told_the_nearest_request() -> None:
    with pytest.raises(
        ConfigError, match=r"Request\(kind='chekpoint'\) asks for nothing. Did you mean 'SaveCheckpoint'"
    ):
        Request(kind="chekpoint")


def test_a_request_is_a_value() -> None:
    asked = SaveCheckpoint(reason="now", filename="a")
    assert replace(asked, filename="b") == SaveCheckpoint(reason="now", filename="b")
    with pytest.raises(TypeError, match="factor"):
        LowerLearningRates(reason="how much?")


def test_a_checkpoint_that_nobody_can_write_is_told() -> None:
    with pytest.warns(GradwatchWarning, match="SaveCheckpoint was not carried out.*Give `on_checkpoint`"):
        watch = trained(rules=[Always(then=Checkpoint())])
    assert [i.rule for i in watch.incidents] == ["always", "request_failed"]


def test_a_checkpoint_that_nobody_can_write_raises_where_errors_are_to_be_raised() -> None:
    with pytest.raises(ConfigError, match="Give `on_checkpoint`"):
        trained(rules=[Always(then=Checkpoint())], on_error="raise")


def test_a_checkpoint_is_asked_for_by_name() -> None:
    asked = []
    trained(rules=[Always(then=Checkpoint())], on_checkpoint=asked.append, on_error="raise")
    assert asked == ["gradwatch-always-0"]


def test_a_callback_that_fails_is_told_and_asked_again() -> None:
    calls = []

    def broken(given: object) -> None:
        calls.append(given)
        raise OSError("no line")

    rules = [Always(name="a", then=Checkpoint()), Always(name="b", then=Asks(SaveCheckpoint))]
    with pytest.warns(GradwatchWarning, match="OSError: no line") as told:
        watch = trained(rules=rules, on_checkpoint=broken)
    assert len(calls) == 2
    assert not any("switched off" in str(warning.message) for warning in told)
    assert not any("switched off" in note for note in watch.session.notes)
    assert [i.rule for i in watch.incidents].count("request_failed") == 2


def test_nobody_told_is_told() -> None:
    def broken(incident: Incident) -> None:
        raise OSError("no line")

    rules = [Always(then=Asks(lambda: TellSomeone(target=broken, incident=INCIDENT)))]
    with pytest.warns(GradwatchWarning, match="TellSomeone was not carried out"):
        trained(rules=rules)
    with pytest.warns(GradwatchWarning, match="TellSomeone was not carried out, training goes on. OSError: no line"):
        trained(rules=[Always(then=Notify(broken))])


def test_surgery_where_no_task_is_seen_is_told() -> None:
    with pytest.warns(GradwatchWarning, match="SwitchSurgery was not carried out"):
        watch = trained(rules=[Always(then=Asks(lambda: SwitchSurgery(surgery=None)))])
    assert "request_failed" in [i.rule for i in watch.incidents]


def test_a_stop_is_heard_by_those_who_step_themselves() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = Watch(model, optimizer, rules=[Always(then=Stop("enough"))])
    model(torch.eye(4)).square().sum().backward()
    watch.after_backward(1.0)
    optimizer.step()
    with pytest.raises(TrainingStopped, match="enough"):
        watch.after_step()
    watch.close()


def test_a_stop_that_was_not_heard_before_the_end_is_heard_there() -> None:
    model = nn.Linear(4, 1)
    watch = Watch(model, torch.optim.SGD(model.parameters(), 0.1), rules=[Always(then=Stop("enough"))])
    model(torch.eye(4)).square().sum().backward()
    watch.after_backward(1.0)
    with pytest.raises(TrainingStopped, match="enough"):
        watch.close()
    watch.close()


def test_surgery_is_an_action_like_the_others() -> None:
    asked = []
    context = type("Context", (), {"request": lambda self, request: asked.append(request)})()
    Surgery("pcgrad").act(INCIDENT, context)
    assert [type(request).__name__ for request in asked] == ["SwitchSurgery"]
