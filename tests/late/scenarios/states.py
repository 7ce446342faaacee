"""Accumulation, several optimizers, closures, checkpoints, silence: what a loop does besides stepping."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from gradwatch import Watch
from gradwatch.rules import Exploding, NonFinite
from gradwatch.treatments import ClipByGlobalNorm, ClipToLimit, SkipStep, ZClip

from ..loops import Loop, faults, fused, momentum, still
from ..places import Place
from ..story import Story
from ._registry import scenario
from .faults import EARLY


def accumulate(loop: Loop, steps: int, bad: dict[int, float]) -> Loop:
    """Train with two micro-batches a step."""
    with loop.ending(), loop.watch:
        for i in range(steps):
            loop.optimizer.zero_grad()
            for half in (0, 1):
                x, y = loop.x[half * 8 : half * 8 + 8], loop.y[half * 8 : half * 8 + 8]
                loss = loop.loss(loop.model, x, y) * (bad.get(i, 1.0) if half else 1.0)
                (loss / 2).backward()
                if half:
                    loop.watch.step(loss=loss, batch=(x, y))
                else:
                    loop.watch.micro_batch(loss, (x, y))
            loop.passed()
    return loop


@scenario()
def gradients_accumulate(place: Place) -> Story:
    options = {"activations_every": 4, "updates_every": 4, "histograms_every": 4}
    story = accumulate(Loop(place, rules="default", **options), 10, {}).story()
    assert story.records[0].num_samples == 16
    return story


@scenario(limits=0.05, rtol=5e-3)  # what follows a clip follows its limit
def gradients_accumulate_and_one_micro_batch_is_bad(place: Place) -> Story:
    rules = [Exploding(**EARLY, then=ClipToLimit()), NonFinite(then=SkipStep())]
    return accumulate(Loop(place, optimizer=fused, rules=rules), 18, {9: math.nan, 13: 1e4}).story()


def in_two(place: Place, **options: object) -> Loop:
    """Return a loop whose two layers have an optimizer each."""
    loop = Loop(place)
    loop.watch.close()
    loop.optimizers = [torch.optim.AdamW(loop.model[i].parameters(), lr=1e-3, fused=True) for i in (0, 2)]
    loop.watch = Watch(loop.model, loop.optimizers, **{**loop.options, **options})
    return loop


@scenario()
def two_optimizers_step_together(place: Place) -> Story:
    loop = in_two(place, rules=[NonFinite()], treatments=[SkipStep()])
    with loop.ending(), loop.watch:
        for i in range(14):
            for optimizer in loop.optimizers:
                optimizer.zero_grad()
            loss = loop.loss(loop.model, loop.x, loop.y) * (math.nan if i == 6 else 1)
            loss.backward()
            loop.watch.step(loss=loss)
            loop.passed()
    return loop.story()


@scenario(limits=0.05)
def two_optimizers_step_in_turns(place: Place) -> Story:
    loop = in_two(place, rules=[NonFinite(), Exploding(**EARLY)], treatments=[ClipByGlobalNorm(0.1), SkipStep()])
    with loop.ending(), loop.watch:
        for i in range(14):
            for k, optimizer in enumerate(loop.optimizers):
                optimizer.zero_grad()
                loss = loop.loss(loop.model, loop.x, loop.y) * (math.nan if (i, k) == (9, 1) else 1)
                loss.backward()
                loop.watch.step(loss=loss, optimizer=optimizer)
                loop.passed()
    story = loop.story()
    assert story.skipped == 1
    return story


@scenario()
def a_closure_is_called_several_times(place: Place) -> Story:
    def lbfgs(params: object) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(params, lr=0.1, max_iter=3)

    loop = Loop(place, optimizer=lbfgs, rules=[NonFinite()])
    with loop.ending(), loop.watch:
        for _ in range(6):

            def closure() -> torch.Tensor:
                loop.optimizer.zero_grad()
                loss = loop.loss(loop.model, loop.x, loop.y)
                loss.backward()
                loop.watch.after_backward(loss)
                return loss

            loop.optimizer.step(closure)
            loop.watch.after_step()
            loop.passed()
    story = loop.story()
    assert len(story.records) == 6
    return story


@scenario()
def the_two_halves_of_a_step_are_called_apart(place: Place) -> Story:
    loop = Loop(place, optimizer=fused, rules=[NonFinite()], treatments=[SkipStep()], updates_every=3)
    with loop.ending(), loop.watch:
        for i in range(14):
            loop.optimizer.zero_grad()
            loss = loop.loss(loop.model, loop.x, loop.y) * (math.nan if i == 6 else 1)
            loss.backward()
            loop.watch.after_backward(loss)
            loop.optimizer.step()
            loop.watch.after_step()
            loop.passed()
    return loop.story()


@scenario(limits=0.05)
def a_checkpoint_in_mid_flight_holds_all_steps(place: Place) -> Story:
    loop = Loop(place, rules=[NonFinite(), Exploding(**EARLY)], treatments=[SkipStep()])
    loop.steps(12, faults({10: math.nan}))
    state = loop.watch.state_dict()
    memory = state["memory"][0]
    judge = memory["judge"]["engines"]["0"]
    said = {
        "step": state["step"],
        "judged": judge["step"],
        "skipped": memory["num_skipped"],
        "open": len(judge["cases"]),
    }
    loop.watch.close()
    assert said == {"step": 12, "judged": 11, "skipped": 1, "open": 1}
    return Story(said=said)


@scenario(limits=0.05)
def a_resumed_run_goes_on_as_if_it_had_not_been_interrupted(place: Place) -> Story:
    def options() -> dict[str, object]:
        return {"rules": [NonFinite(), Exploding(**EARLY)], "treatments": [ZClip(warmup=4), SkipStep()]}

    bad = faults({17: 1e4})
    loop = Loop(place, optimizer=momentum, **options())
    loop.steps(12, bad)
    state = copy.deepcopy(loop.watch.state_dict())
    loop.watch.close()
    loop.options |= options()
    loop.watch = loop.make_watch()
    loop.watch.load_state_dict(state)
    with loop.ending(), loop.watch:
        loop.steps(10, bad)
    story = loop.story()
    assert story.records[0].step == 12
    assert ("exploding", 17) in story.rules, story.rules
    return story


@scenario(limits=0.05)
def a_resume_on_the_step_after_a_nan(place: Place) -> Story:
    loop = Loop(place, optimizer=fused, rules=[NonFinite(for_steps=1)], treatments=[SkipStep(max_consecutive=4)])
    bad = faults(dict.fromkeys(range(8, 11), math.nan))
    loop.steps(10, bad)
    state = copy.deepcopy(loop.watch.state_dict())
    loop.watch.close()
    loop.options |= {"rules": [NonFinite(for_steps=1)], "treatments": [SkipStep(max_consecutive=4)]}
    loop.watch = loop.make_watch()
    loop.watch.load_state_dict(state)
    with loop.ending(), loop.watch:
        loop.steps(8, bad)
    story = loop.story()
    assert story.skipped == 3
    return story


@scenario(limits=0.05)
def rules_are_silent_over_the_steps_they_were_told(place: Place) -> Story:
    loop = Loop(place, optimizer=still, rules=[Exploding(**EARLY)])
    with loop.ending(), loop.watch:
        for i in range(20):
            if i == 12:
                loop.watch.annotate("new data", silence=4)
            loop.once(1e4 if 12 <= i < 16 else 1)
    story = loop.story()
    assert story.rules == []
    return story


@scenario(limits=0.05)
def a_silence_ends(place: Place) -> Story:
    loop = Loop(place, rules=[NonFinite()], treatments=[SkipStep()])
    with loop.ending(), loop.watch:
        for i in range(18):
            if i == 8:
                loop.watch.annotate("new data", silence=4)
            loop.once(math.nan if i in (9, 13) else 1)
    story = loop.story()
    assert story.rules == [("non_finite", 13)]
    return story


@scenario()
def validation_values_stand_on_the_next_record(place: Place) -> Story:
    loop = Loop(place, rules="default")
    with loop.ending(), loop.watch:
        for i in range(12):
            loop.once()
            if i % 4 == 3:
                loop.watch.validation(loss=torch.tensor(0.5 + i).to(place.device), accuracy=0.25)
    story = loop.story()
    assert story.record(4).scalars["val_loss"] == 3.5
    return story


@scenario()
def a_layer_is_unfrozen(place: Place) -> Story:
    loop = Loop(place, rules="default")
    loop.model[0].weight.requires_grad_(False)
    with loop.ending(), loop.watch:
        for i in range(12):
            if i == 6:
                loop.model[0].weight.requires_grad_(True)
            loop.once()
    return loop.story()


@scenario()
def a_parameter_gets_no_gradient_for_a_while(place: Place) -> Story:
    loop = Loop(place, optimizer=momentum, rules="default", treatments=[ZClip(warmup=2)], updates_every=1)
    with loop.ending(), loop.watch:
        for i in range(14):
            bias = loop.model[0].bias
            bias.requires_grad_(not 4 <= i < 7)
            loop.once()
    return loop.story()


class Words(nn.Module):
    """An embedding with sparse gradients, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6, sparse=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(x.abs().mul(5).long().clamp(max=19)).mean(1))


@scenario()
def task_losses_are_told_apart(place: Place) -> Story:
    def options() -> dict[str, object]:
        return {"rules": [], "conflicts_every": 2, "surgery": "pcgrad"}

    loop = Loop(place, **options())
    with loop.ending(), loop.watch:
        for _ in range(6):
            loop.optimizer.zero_grad()
            out = loop.model(loop.x)
            loop.watch.backward({"a": nn.functional.cross_entropy(out, loop.y), "b": out.square().mean()})
            loop.watch.step()
            loop.passed()
    return loop.story()
