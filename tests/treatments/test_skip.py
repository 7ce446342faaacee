"""SkipStep, SkipParameter, ResetMoments and BufferKeeper: what a bad step must not leave behind."""

import math

import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigError, GradwatchWarning
from gradwatch.records import Finding
from gradwatch.requests import StopTraining
from gradwatch.stats import Gradients
from gradwatch.treatments import BufferKeeper, ResetMoments, SkipParameter, SkipStep, reset_moments_

from ._steps import Step, gradients

BAD, GOOD = [math.nan, 1.0], [1.0, 1.0]


def play(treatment: SkipStep, values: list[list[float]], start: int = 0) -> list[Step]:
    contexts = []
    for step, value in enumerate(values, start):
        contexts.append(Step(step=step))
        treatment.apply_(gradients(value), contexts[-1])
    return contexts


def test_on_its_own_it_skips_steps_that_are_not_finite() -> None:
    contexts = play(SkipStep(), [GOOD, BAD, [math.inf, 0.0], GOOD])
    assert [bool(c.vetoes) for c in contexts] == [False, True, True, False]
    assert contexts[1].vetoes == [(True, "the global gradient norm is not finite")]
    assert not any(c.requests for c in contexts)


def test_a_row_of_skipped_steps_ends_in_a_stop_with_a_reason() -> None:
    contexts = play(SkipStep(3), [BAD, BAD, GOOD, BAD, BAD, BAD])
    assert [len(c.requests) for c in contexts] == [0, 0, 0, 0, 0, 1]
    request = contexts[-1].requests[0]
    assert isinstance(request, StopTraining)
    assert request.reason == (
        "3 optimizer steps in a row were skipped, the last at step 5 because the global gradient norm is not finite: "
        "the gradients do not recover by themselves. Look at the first of these steps; SkipStep(max_consecutive=3) "
        "sets how many are borne."
    )


def test_the_step_that_exhausts_the_budget_is_skipped_too() -> None:
    assert play(SkipStep(1), [BAD])[0].vetoes


def test_without_a_budget_it_skips_for_ever() -> None:
    assert not any(c.requests for c in play(SkipStep(None), [BAD] * 50))


def test_behind_a_rule_it_skips_where_the_rule_fired_whatever_the_norm() -> None:
    for trigger, value in [(True, GOOD), (False, BAD)]:
        context = Step(rule="exploding", trigger=trigger)
        SkipStep().apply_(gradients(value), context)
        assert context.vetoes == ([(True, "rule 'exploding' fired")] if trigger else [])


def test_a_gap_in_the_steps_ends_a_row() -> None:
    treatment = SkipStep(3)
    for step in (4, 5, 9, 10):
        context = Step(step=step, rule="non_finite")
        treatment.apply_(gradients(GOOD), context)
        assert not context.requests
    context = Step(step=11, rule="non_finite")
    treatment.apply_(gradients(GOOD), context)
    assert context.requests


def test_the_count_goes_on_after_a_resume() -> None:
    first = SkipStep(3)
    play(first, [BAD, BAD])
    second = SkipStep(3)
    second.load_state_dict(first.state_dict())
    assert play(second, [BAD], start=2)[0].requests


def test_on_a_device_the_flag_is_not_read_and_counted_when_it_arrives() -> None:
    treatment, requests = SkipStep(2), []
    for step in range(2):
        param = nn.Parameter(torch.ones(2, device="meta"))
        param.grad = torch.ones_like(param)
        context = Step(step=step, can_read=False)
        report = treatment.apply_(Gradients.collect([("w", param)]), context)
        assert context.vetoes[0][0] is report["applied"]
        later = Step(step=step)
        added = treatment.settle({"applied": 1.0}, later)
        requests.append(len(later.requests))
    assert added == {"consecutive": 2.0, "skipped": 2.0}
    assert requests == [0, 1]
    # What was counted when it was applied is not counted again.
    assert treatment.settle({"applied": 1.0, "consecutive": 2.0}, Step(step=2)) == {}


def test_the_budget_must_be_a_count() -> None:
    with pytest.raises(ConfigError) as error:
        SkipStep(0)
    assert str(error.value) == "SkipStep: `max_consecutive` must be a whole number of at least 1, or None. Got 0."


def test_skip_parameter_takes_away_the_gradients_that_are_not_finite() -> None:
    grads = gradients([math.nan], [2.0], paths=["a.w", "b.w"])
    params = grads.params
    report = SkipParameter().apply_(grads, Step())
    assert params[0].grad is None
    assert grads.paths == ("b.w",)
    assert float(grads.global_norm) == 2.0
    assert report == {"applied": 1.0, "skipped": 1.0}


def test_skip_parameter_takes_those_that_the_rule_names() -> None:
    def left(findings, paths="*"):
        grads = gradients([1.0], [2.0], [3.0], paths=["a.w", "a.b", "c.w"])
        SkipParameter(paths).apply_(grads, Step(rule="exploding", findings=findings))
        return grads.paths

    named = tuple(Finding(rule="exploding", step=0, path=p) for p in ["a"])
    assert left(named) == ("c.w",)
    assert left((Finding(rule="exploding", step=0, path="c.w"),)) == ("a.w", "a.b")
    assert left((Finding(rule="exploding", step=0),), "a.*") == ("c.w",)


def test_a_skipped_parameter_does_not_move_though_momentum_would_move_it() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(params, lr=0.1)
    for bad in (1.0, math.nan):
        params[0].grad, params[1].grad = torch.full((2,), bad), torch.ones(2)
        before = params[0].detach().clone()
        SkipParameter().apply_(Gradients.collect(list(zip("ab", params, strict=True))), Step())
        optimizer.step()
    assert torch.equal(params[0], before)
    assert torch.isfinite(params[1]).all()
    assert optimizer.state[params[0]]["step"] == 1


def test_skip_parameter_vetoes_the_step_where_it_must_not_look() -> None:
    param = nn.Parameter(torch.ones(2, device="meta"))
    param.grad = torch.ones_like(param)
    context = Step(can_read=False)
    SkipParameter().apply_(Gradients.collect([("w", param)]), context)
    assert len(context.vetoes) == 1
    assert param.grad is not None


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
        lambda p: torch.optim.NAdam(p),
        lambda p: torch.optim.Adagrad(p),
    ],
    ids=["adam", "sgd", "rmsprop", "nadam", "adagrad"],
)
def test_after_a_reset_an_optimizer_steps_as_a_new_one(build) -> None:
    def step(optimizer, param, value):
        param.grad = torch.full((3,), value)
        optimizer.step()
        return param.detach().clone()

    used = nn.Parameter(torch.zeros(3))
    optimizer = build([used])
    step(optimizer, used, 1000.0)
    with torch.no_grad():
        used.zero_()
    ResetMoments().apply_(gradients_of(used), Step(rule="exploding", optimizers=(optimizer,)))
    new = nn.Parameter(torch.zeros(3))
    fresh = build([new])
    for value in (1.0, 2.0):
        torch.testing.assert_close(step(optimizer, used, value), step(fresh, new, value))


def gradients_of(param: nn.Parameter) -> Gradients:
    return Gradients.collect([("w", param)])


def test_a_reset_heals_moments_that_are_not_finite() -> None:
    state = {"exp_avg": torch.tensor([math.nan]), "exp_avg_sq": torch.tensor([math.inf]), "step": torch.tensor(9.0)}
    assert reset_moments_(state) == 2
    assert {k: float(v) for k, v in state.items()} == {"exp_avg": 0.0, "exp_avg_sq": 0.0, "step": 0.0}


def test_on_its_own_it_resets_at_its_period() -> None:
    param = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([param])
    param.grad = torch.ones(1)
    optimizer.step()
    done = [
        ResetMoments(3).apply_(gradients_of(param), Step(step=s, optimizers=(optimizer,)))["applied"] for s in range(7)
    ]
    assert done == [0, 0, 0, 1, 0, 0, 1]
    assert ResetMoments().apply_(gradients_of(param), Step(step=500, optimizers=(optimizer,)))["applied"] == 0


def test_a_verdict_that_comes_later_resets_later() -> None:
    param = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([param])
    param.grad = torch.ones(1)
    optimizer.step()
    treatment = ResetMoments()
    waiting = Step(rule="exploding", trigger=torch.ones((), dtype=torch.bool, device="meta"), can_read=False)
    treatment.apply_(gradients_of(param), waiting)
    assert optimizer.state[param]["exp_avg"] != 0
    report = treatment.settle({"applied": 1.0}, Step(optimizers=(optimizer,)))
    assert report == {"reset": 2.0}
    assert optimizer.state[param]["exp_avg"] == 0
    assert treatment.settle({"applied": 1.0}, Step()) == {}


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("absent", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.replaced = self.replaced + 1
        return self.norm(x)


def test_buffers_come_back_as_they_were_bit_for_bit() -> None:
    model = WithBuffers()
    keeper = BufferKeeper(model)
    model(torch.randn(8, 3))
    keeper.keep()
    before = {k: v.clone() for k, v in model.named_buffers()}
    model(torch.full((8, 3), math.nan))
    assert torch.isnan(model.norm.running_mean).all()
    assert keeper.restore()
    after = dict(model.named_buffers())
    assert sorted(after) == ["norm.num_batches_tracked", "norm.running_mean", "norm.running_var", "replaced"]
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_before_the_first_good_step_there_is_nothing_to_restore() -> None:
    model = nn.BatchNorm1d(3)
    model(torch.randn(4, 3))
    before = model.running_mean.clone()
    assert not BufferKeeper(model).restore()
    assert torch.equal(model.running_mean, before)


def test_buffers_that_changed_their_shape_or_type_are_kept_anew() -> None:
    model = nn.Module()
    model.register_buffer("cache", torch.zeros(2))
    keeper = BufferKeeper(model)
    model.cache = torch.arange(5)
    keeper.keep()
    model.cache.zero_()
    keeper.restore()
    assert model.cache.tolist() == [0, 1, 2, 3, 4]


def test_memory_is_bounded_and_the_largest_are_left_out() -> None:
    model = nn.Module()
    model.register_buffer("mask", torch.zeros(1000))
    model.register_buffer("mean", torch.zeros(10))
    with pytest.warns(GradwatchWarning, match="1 of 2 buffers are not kept"):
        keeper = BufferKeeper(model, memory_limit_bytes=100)
    assert keeper.left_out == ("mask",)
    assert keeper.num_bytes == 40
    assert len(keeper) == 1


def test_shared_buffers_are_kept_once() -> None:
    model = nn.Module()
    model.a, model.b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    model.b.running_mean = model.a.running_mean
    assert len(BufferKeeper(model)) == 5
