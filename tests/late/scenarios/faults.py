"""What goes wrong in a run, and what is told of it."""

from __future__ import annotations

import math

import torch
from torch import nn

from gradwatch.rules import Exploding, NonFinite
from gradwatch.stats import Statistic
from gradwatch.treatments import BaseTreatment, ClipByGlobalNorm, ClipToLimit, SkipStep

from ..loops import NAN, SPIKE, Loop, faults, fused, momentum
from ..places import Place
from ..story import Story
from ._registry import scenario

EARLY = {"min_samples": 8, "window": 16}


@scenario()
def a_healthy_run_at_defaults(place: Place) -> Story:
    loop = Loop(place, optimizer=fused, rules="default", activations_every=5, updates_every=5, histograms_every=5)
    story = loop.run(12).story()
    assert len(story.records) == 12
    return story


@scenario()
def everything_measured_at_every_step(place: Place) -> Story:
    options = dict.fromkeys(("activations_every", "updates_every", "histograms_every"), 1)
    return Loop(place, optimizer=momentum, rules="default", **options).run(6).story()


@scenario()
def measured_at_every_third_step(place: Place) -> Story:
    story = Loop(place, rules="default", every=3, activations_every=3, updates_every=3).run(10).story()
    assert [r.step for r in story.records] == [0, 3, 6, 9]
    return story


@scenario(limits=0.05)
def a_spike_is_told(place: Place) -> Story:
    story = Loop(place, rules=[Exploding(**EARLY)]).run(16, SPIKE).story()
    assert story.rules == [("exploding", 12)]
    return story


@scenario(limits=0.05)
def a_spike_is_clipped_in_its_step(place: Place) -> Story:
    loop = Loop(place, rules=[Exploding(**EARLY, then=ClipToLimit())])
    story = loop.run(16, SPIKE).story()
    assert story.record(12).global_norm_after < 0.01 * story.record(12).global_norm
    assert story.incidents[0].treatments == ("clip_to_limit",)
    return story


@scenario(limits=0.05)
def spikes_two_steps_running(place: Place) -> Story:
    loop = Loop(place, rules=[Exploding(**EARLY, then=ClipToLimit())])
    return loop.run(18, faults({12: 1e4, 13: 1e4})).story()


@scenario(limits=0.3, rtol=5e-3)  # what follows a clip follows its limit
def autoclip_meets_a_spike_and_a_nan(place: Place) -> Story:
    rules = [Exploding(**EARLY, then=ClipToLimit()), NonFinite(then=SkipStep())]
    story = Loop(place, optimizer=fused, rules=rules).run(18, faults({9: math.nan, 13: 1e4})).story()
    assert story.skipped == 1
    return story


@scenario()
def a_nan_is_told(place: Place) -> Story:
    story = Loop(place, rules=[NonFinite()]).run(10, NAN).story()
    assert story.rules == [("non_finite", 6)]
    return story


@scenario()
def a_nan_is_skipped_by_an_optimizer_that_must_be_told(place: Place) -> Story:
    story = Loop(place, optimizer=momentum, rules=[NonFinite()], treatments=[SkipStep()]).run(10, NAN).story()
    assert story.record(6).skipped
    return story


@scenario()
def a_nan_is_skipped_by_an_optimizer_that_asks_the_device(place: Place) -> Story:
    story = Loop(place, optimizer=fused, rules=[NonFinite()], treatments=[SkipStep()]).run(10, NAN).story()
    assert story.record(6).skipped
    return story


@scenario()
def a_nan_at_the_first_step_is_skipped(place: Place) -> Story:
    def fused_sgd(params: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True)

    junk = [torch.full((12, 6), 1e30, device=place.device) for _ in range(64)]
    del junk  # what freed memory may hold
    loop = Loop(place, optimizer=fused_sgd, treatments=[SkipStep()]).run(5, faults({0: math.nan}))
    assert all(torch.isfinite(p).all() and p.abs().max() < 10 for p in loop.model.parameters())
    return loop.story()


@scenario()
def a_rule_skips_a_nan(place: Place) -> Story:
    story = Loop(place, optimizer=fused, rules=[NonFinite(then=SkipStep())]).run(10, NAN).story()
    assert story.incidents[0].treatments == ("skip_step",)
    return story


@scenario()
def a_nan_in_the_last_step(place: Place) -> Story:
    return Loop(place, rules=[NonFinite()], treatments=[SkipStep()]).run(10, faults({9: math.nan})).story()


@scenario()
def a_loss_that_is_bad_while_gradients_are_not(place: Place) -> Story:
    loop = Loop(place, rules=[NonFinite()])
    with loop.ending(), loop.watch:
        for i in range(10):
            loop.optimizer.zero_grad()
            loss = loop.loss(loop.model, loop.x, loop.y)
            loss.backward()
            loop.watch.step(loss=loss.detach() * (math.inf if i == 5 else 1))
            loop.passed()
    story = loop.story()
    assert story.rules == [("non_finite", 5)]
    return story


def norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


@scenario()
def buffers_are_put_back_where_a_step_is_skipped(place: Place) -> Story:
    loop = Loop(place, model=norm_net, optimizer=fused, treatments=[SkipStep()])
    with loop.ending(), loop.watch:
        for i in range(12):
            good = loop.x
            loop.x = good * math.nan if i == 6 else good
            loop.once()
            loop.x = good
    assert all(torch.isfinite(b).all() for b in loop.model.buffers())
    return loop.story()


@scenario()
def a_scaler_finds_overflows(place: Place) -> Story:
    loop = Loop(place, scale=2.0**120, rules=[NonFinite()])
    story = loop.run(12, faults(dict.fromkeys(range(5), 1e9))).story()
    assert story.overflows > 2
    return story


@scenario()
def a_scalers_overflows_are_no_skips(place: Place) -> Story:
    loop = Loop(place, scale=2.0**120, treatments=[SkipStep()])
    story = loop.run(20, faults(dict.fromkeys(range(12), 1e9))).story()
    assert story.end == ""
    assert story.skipped == 0
    return story


@scenario()
def a_scalers_overflows_are_not_treated_by_rules(place: Place) -> Story:
    rules = [Exploding(**EARLY, then=ClipToLimit()), NonFinite(then=[ClipByGlobalNorm(0.5), SkipStep(3)])]
    loop = Loop(place, scale=2.0**120, rules=rules)
    story = loop.run(20, faults(dict.fromkeys(range(12), 1e9))).story()
    assert story.end == ""
    assert story.overflows > 4
    assert story.skipped == 0
    assert not any(t.applied for record in story.records[:12] for t in record.treatments)
    return story


@scenario()
def a_scaler_and_a_fused_optimizer(place: Place) -> Story:
    loop = Loop(place, scale=2.0**10, optimizer=fused, rules="default", treatments=[ClipByGlobalNorm(0.5)])
    return loop.run(12, faults({4: math.inf})).story()


@scenario(limits=0.05)
def a_scaler_and_a_spike(place: Place) -> Story:
    loop = Loop(place, scale=2.0**10, rules=[Exploding(**EARLY, then=ClipToLimit())])
    return loop.run(16, SPIKE).story()


class Born(nn.Module):
    """Divides by zero when told to."""

    bad = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x - x) if self.bad else x


def born_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), Born(), nn.Linear(12, 3))


@scenario()
def an_autopsy_finds_where_a_nan_was_born(place: Place) -> Story:
    loop = Loop(place, model=born_net, rules=[NonFinite()], autopsy=True)
    with loop.ending(), loop.watch:
        for i in range(12):
            loop.model[1].bad = i == 6
            loop.once()
    story = loop.story()
    assert story.incidents[0].details["born_in"] == "1"
    return story


@scenario(closely=True)
def modules_are_watched_closely_after_an_alarm(place: Place) -> Story:
    loop = Loop(place, rules=[NonFinite()], treatments=[SkipStep()], activations_every=100)
    story = loop.run(14, faults({5: math.nan})).story()
    assert any("output_rms" in r.columns for r in story.records[6:])
    return story


@scenario()
def dead_units_and_other_findings_of_activations(place: Place) -> Story:
    def dead() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
        with torch.no_grad():
            model[0].bias.fill_(-5)
        return model

    return Loop(place, model=dead, rules="default", activations_every=1).run(12).story()


class Says(BaseTreatment):
    """Reports what is no number at the fifth step."""

    num = 0

    def apply_(self, grads, context):
        self.num += 1
        return {"share": torch.ones(3 if self.num == 5 else 1, device=grads.device)}


@scenario()
def a_treatment_reports_what_is_no_number(place: Place) -> Story:
    story = Loop(place, treatments=[Says()]).run(8).story()
    assert [r.step for r in story.records if r.skipped] == [4]
    assert [i.treatments for i in story.incidents] == [("says",)]
    assert len(story.records) == 8
    return story


class GivesUp(Statistic):
    """Fails at the sixth step, when the numbers of those before may not have arrived."""

    def sums(self, view):
        if view.step == 5:
            raise RuntimeError("my bug")
        return view.rows([grad.sum() for grad in view.grads])

    def finish(self, sums, maxima):
        return sums[:, 0]


@scenario()
def a_statistic_fails_while_its_numbers_are_on_their_way(place: Place) -> Story:
    story = Loop(place, statistics=[GivesUp()]).run(9).story()
    assert ["gives_up" in r.columns for r in story.records] == [True] * 5 + [False] * 4
    return story


class RaisesOnce(torch.optim.SGD):
    """An optimizer whose fourth step raises."""

    num = 0

    def step(self, closure=None):
        self.num += 1
        if self.num == 4:
            raise OverflowError("no room for the state")
        return super().step(closure)


@scenario()
def an_optimizer_raises_and_the_loop_goes_on(place: Place) -> Story:
    loop = Loop(place, optimizer=lambda ps: RaisesOnce(ps, lr=1e-3), treatments=[ClipByGlobalNorm(0.01)])
    with loop.watch:
        for _ in range(8):
            try:
                loop.once()
            except OverflowError:
                loop.passed()
    story = loop.story()
    assert [r.step for r in story.records] == list(range(8))
    assert all(math.isclose(r.global_norm_after, 0.01, rel_tol=1e-4) for r in story.records)
    return story
