"""What rules ask of the trainer, and runs that end before their time."""

from __future__ import annotations

import math
from typing import Any

from gradwatch.rules import Exploding, NonFinite
from gradwatch.treatments import Checkpoint, LowerLearningRate, Notify, SkipStep, Stop

from ..loops import NAN, SPIKE, Loop, faults, fused
from ..places import Place
from ..story import Story
from ._registry import scenario
from .faults import EARLY


@scenario(actions=True, limits=0.05)
def a_checkpoint_is_asked_for(place: Place) -> Story:
    story = Loop(place, rules=[Exploding(**EARLY, then=Checkpoint())]).run(20, SPIKE).story()
    assert [kind for kind, _ in story.requests] == ["checkpoint"]
    return story


@scenario(actions=True)
def someone_is_notified(place: Place) -> Story:
    told: list[Loop] = []
    loop = Loop(place, rules=[NonFinite(then=Notify(lambda incident: told[0].notified(incident)))])
    told.append(loop)
    story = loop.run(14, NAN).story()
    assert [kind for kind, _ in story.requests] == ["notify of non_finite at 6"]
    return story


@scenario(actions=True)
def someone_is_notified_of_the_last_step(place: Place) -> Story:
    told: list[Loop] = []
    loop = Loop(place, rules=[NonFinite(then=Notify(lambda incident: told[0].notified(incident)))])
    told.append(loop)
    story = loop.run(10, faults({9: math.nan})).story()
    assert [kind for kind, _ in story.requests] == ["notify of non_finite at 9"]
    return story


@scenario(actions=True)
def learning_rates_are_lowered(place: Place) -> Story:
    loop = Loop(place, rules=[NonFinite(then=LowerLearningRate(0.5, steps=None))], treatments=[SkipStep()])
    factors = []
    with loop.ending(), loop.watch:
        for i in range(16):
            loop.once(math.nan if i == 6 else 1)
            factors.append(loop.watch.session.engine.rates.factor)
    loop.requests.append(("lowered", factors.index(0.5)))
    return loop.story()


@scenario(actions=True)
def a_rule_stops_the_run(place: Place) -> Story:
    story = Loop(place, rules=[NonFinite(then=Stop("enough"))]).run(18, NAN).story()
    assert story.end == "TrainingStopped: enough"
    # How many steps later it ended is compared as the step of a request is.
    story.requests.append(("stop", story.records[-1].step))
    return story


@scenario(actions=True)
def a_rule_stops_the_run_at_its_last_step(place: Place) -> Story:
    story = Loop(place, rules=[NonFinite(then=Stop("enough"))]).run(10, faults({9: math.nan})).story()
    assert story.end == "TrainingStopped: enough"
    story.requests.append(("stop", story.records[-1].step))
    return story


@scenario(actions=True)
def a_rule_stops_the_run_once_it_fired_often_enough(place: Place) -> Story:
    story = Loop(place, rules=[NonFinite(stop_after=3)]).run(18, faults(dict.fromkeys(range(5, 18), math.nan))).story()
    assert story.end.startswith("TrainingStopped")
    story.requests.append(("stop", 7))
    return story


@scenario(actions=True)
def too_many_skips_stop_the_run(place: Place) -> Story:
    loop = Loop(place, optimizer=fused, treatments=[SkipStep(max_consecutive=3)])
    story = loop.run(18, faults(dict.fromkeys(range(5, 18), math.nan))).story()
    assert "3 optimizer steps in a row were skipped" in story.end
    story.requests.append(("stop", story.records[-1].step))
    return story


@scenario()
def two_bouts_of_skips_are_counted_apart(place: Place) -> Story:
    loop = Loop(place, optimizer=fused, treatments=[SkipStep(max_consecutive=3)])
    story = loop.run(16, faults(dict.fromkeys([4, 5, 8, 9], math.nan))).story()
    assert (story.end, story.skipped) == ("", 4)
    return story


@scenario()
def the_users_own_error_ends_the_run(place: Place) -> Story:
    loop = Loop(place, rules=[NonFinite()])
    with loop.ending(), loop.watch:
        loop.steps(8, faults({6: math.nan}))
        raise IndexError("the user's own")
    assert loop.end == "IndexError: the user's own"
    return loop.story(hooks=hooks_left(loop))


@scenario()
def the_users_own_error_ends_a_run_whose_device_is_broken(place: Place) -> Story:
    loop = Loop(place, rules=[NonFinite()])
    with loop.ending(), loop.watch:
        loop.steps(8)
        place.break_device()
        raise IndexError("the user's own")
    story = Story(end=loop.end, said={"hooks": hooks_left(loop), "closed": loop.watch.session.closed})
    assert story.end == "IndexError: the user's own"
    assert story.said == {"hooks": 0, "closed": True}
    return story


def hooks_left(loop: Loop) -> int:
    """Return how many hooks are still on the model and the optimizer."""
    on_modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loop.model.modules())
    optimizer = loop.optimizer
    return on_modules + len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


@scenario()
def a_failing_treatment_vetoes_its_step(place: Place) -> Story:
    class Fails(SkipStep):
        name = "fails"

        def apply_(self, grads: Any, context: Any) -> Any:
            if context.step == 6:
                raise ValueError("no")
            return super().apply_(grads, context)

    story = Loop(place, optimizer=fused, treatments=[Fails()]).run(12).story()
    assert story.rules == [("treatment_failed", 6)]
    assert story.record(6).skipped
    return story


@scenario()
def closed_without_a_with(place: Place) -> Story:
    loop = Loop(place, rules="default")
    loop.steps(8, faults({6: math.nan}))
    loop.watch.close()
    loop.watch.close()
    return loop.story(hooks=hooks_left(loop))
