"""Treatments act in the same step, skips leave everything as documented, and failures never fail open."""

import copy
import math
from itertools import permutations

import pytest
import torch
from torch import nn

from gradwatch import ConfigError, GradwatchWarning, Watch
from gradwatch.errors import TrainingStopped
from gradwatch.rules import Exploding, Expression, NonFinite, Rule
from gradwatch.treatments import (
    ClipByGlobalNorm,
    ClipByNorm,
    LowerLearningRate,
    Sanitize,
    Scale,
    SkipStep,
    Stop,
    Surgery,
)

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(inplace=True), nn.Linear(32, 1))


def batches(steps: int, *bad: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(steps):
        x = torch.randn(64, 10, generator=generator)
        y = torch.sin(x.sum(1, keepdim=True))
        found.append((x * math.nan if i in bad else x, y))
    return found


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [v for s in optimizer.state_dict()["state"].values() for v in s.values() if isinstance(v, torch.Tensor)]
    return [*model.parameters(), *model.buffers(), *states]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [(0,), (17,), (5, 6, 7)], ids=["first", "later", "three-in-a-row"])
def test_skipping_nan_batches_equals_a_loop_that_drops_those_steps(name: str, bad: tuple[int, ...]) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
    with Watch(model, optimizer, rules="autoclip", on_error="raise") as watch:
        for x, y in batches(30, *bad):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            watch.step(loss=loss)
            schedule.step()
    twin = net()
    twin_optimizer = OPTIMIZERS[name](twin.parameters())
    twin_schedule = torch.optim.lr_scheduler.StepLR(twin_optimizer, 10, 0.5)
    for i, (x, y) in enumerate(batches(30, *bad)):
        twin_optimizer.zero_grad()
        good = copy.deepcopy(list(twin.buffers()))
        loss = (twin(x) - y).square().mean()
        loss.backward()
        if i in bad:
            with torch.no_grad():
                for buffer, kept in zip(twin.buffers(), good, strict=True):
                    buffer.copy_(kept)
            twin_optimizer.zero_grad()
        twin_optimizer.step()
        twin_schedule.step()
    mine, theirs = everything(model, optimizer), everything(twin, twin_optimizer)
    assert len(mine) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert schedule.get_last_lr() == twin_schedule.get_last_lr()
    assert [r.step for r in watch.history if r.skipped] == list(bad)
    assert watch.session.engine.completion.num_skipped == len(bad)


def test_ten_bad_steps_in_a_row_end_in_a_stop_with_a_clear_error() -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    watch = Watch(model, optimizer, rules="autoclip", on_error="raise")
    steps = 0

    def train() -> None:
        nonlocal steps
        for x, y in batches(30, *range(5, 30)):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            watch.step()
            steps += 1

    with pytest.raises(TrainingStopped, match="10 optimizer steps in a row were skipped"):
        train()
    assert steps == 14
    watch.close()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_clip_by_global_norm_on_every_step_equals_torchs_own() -> None:
    def run(treated: bool) -> list[torch.Tensor]:
        model = net()
        optimizer = OPTIMIZERS["momentum"](model.parameters())
        treatments = [ClipByGlobalNorm(0.1)] if treated else []
        with Watch(model, optimizer, rules="observe", treatments=treatments, on_error="raise") as watch:
            for x, y in batches(10):
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                if not treated:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                record = watch.step().record
                assert record.global_norm_after <= 0.1 * (1 + 1e-5)
                assert record.global_norm > 0.1001
        return list(model.parameters())

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


MADE = {
    "sanitize": lambda: Sanitize(),
    "scale": lambda: Scale(100.0),
    "clip_by_norm": lambda: ClipByNorm(0.5),
    "clip_by_global_norm": lambda: ClipByGlobalNorm(0.25),
}


@pytest.mark.parametrize("behind", ["every-step", "a-rule", "both"])
@pytest.mark.parametrize("given", permutations(MADE), ids="-".join)
def test_treatments_act_in_the_order_that_is_right_whatever_the_order_they_are_given_in(
    given: tuple[str, ...], behind: str
) -> None:
    model = net()
    made = [MADE[name]() for name in given]
    first = {"every-step": made, "a-rule": [], "both": made[:2]}[behind]
    always = Expression("step >= 0", name="always", then=[t for t in made if t not in first])
    with Watch(model, OPTIMIZERS["sgd"](model.parameters()), rules=[always], treatments=first) as watch:
        (x, y), *_ = batches(1)
        (model(x) - y).square().mean().backward()
        record = watch.step().record
    assert [t.name for t in record.treatments] == list(MADE)
    assert record.global_norm_after == pytest.approx(0.25, rel=1e-5)


class Broken:
    name = "broken"

    def apply_(self, grads, context):
        raise ZeroDivisionError("mine")

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_a_treatment_that_raises_vetoes_the_step_and_is_a_critical_incident() -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    before = copy.deepcopy(list(model.parameters()))
    watch = Watch(model, optimizer, treatments=[Broken()])
    (x, y), *_ = batches(1)
    (model(x) - y).square().mean().backward()
    with pytest.warns(GradwatchWarning, match="broken"):
        outcome = watch.step()
    assert outcome.skip
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    (incident,) = [i for i in watch.incidents if i.severity == "critical"]
    assert incident.rule == "treatment_failed"
    watch.close()


def test_a_treatment_that_fails_is_said_to_veto_and_not_to_be_off_and_ends_a_run_that_stands_still() -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    before = copy.deepcopy(list(model.parameters()))
    watch = Watch(model, optimizer, rules=[], treatments=[Broken()])

    def train() -> None:
        for x, y in batches(30):
            (model(x) - y).square().mean().backward()
            watch.step()

    with (
        pytest.warns(GradwatchWarning, match="treatment 'broken' failed: a step at which it fails is vetoed") as told,
        pytest.raises(TrainingStopped, match="treatment 'broken' failed at 10 steps in a row"),
    ):
        train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len([w for w in told if "broken" in str(w.message)]) == 1
    assert not any("switched off" in str(w.message) for w in told)
    assert [i.rule for i in watch.incidents if i.severity == "critical"] == ["treatment_failed"]
    watch.close()


def test_a_treatment_that_fails_now_and_then_does_not_end_the_run() -> None:
    class Sometimes(Broken):
        name = "sometimes"

        def apply_(self, grads, context):
            if context.step % 5:
                super().apply_(grads, context)

    model = net()
    watch = Watch(model, OPTIMIZERS["adamw"](model.parameters()), rules=[], treatments=[Sometimes()])

    def train() -> None:
        for x, y in batches(30):
            (model(x) - y).square().mean().backward()
            watch.step()
        watch.close()

    with pytest.warns(GradwatchWarning, match="sometimes"):
        train()
    assert [r.skipped for r in watch.history] == [bool(r.step % 5) for r in watch.history]
    assert [i.rule for i in watch.incidents if i.severity == "critical"] == ["treatment_failed"] * 6


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        ("clip_by_global_norm", "Write treatments=[ClipByGlobalNorm(max_norm=...)], with `from gradwatch.treatments"),
        (["clip_by_global_norm"], "treatments=[ClipByGlobalNorm(max_norm=...)]"),
        ("ClipByNorm", "treatments=[ClipByNorm(max_norm=...)]"),
        ("clip-by-norm", "treatments=[ClipByNorm(max_norm=...)]"),
        ("clip_by_norm(1.0)", "treatments=[ClipByNorm(1.0)]"),
        ("clip_by_global_norm_", "treatments=[ClipByGlobalNorm(max_norm=...)]"),
        ("clip_grad_norm_", "treatments=[ClipByGlobalNorm(max_norm=...)]"),
        ("clip_grad_value_", "treatments=[ClipByValue("),
        ("Clip By Value", "treatments=[ClipByValue("),
        ("gradient_clip_val", "treatments=[ClipByGlobalNorm(max_norm=...)]"),
        ("SkipStep", "Did you mean 'skip_step'?"),
        ("SkipStep()", "treatments=[SkipStep()]"),
        ("z-clip", "Did you mean 'zclip'?"),
        ("AGC", "Did you mean 'adaptive_clip'?"),
        ("skip_stpe", "Did you mean 'skip_step'"),
        ("clip_by_nrom", "Did you mean 'clip_by_norm'"),
        ({"clip_by_norm": {"max_norm": 2.0}}, "treatments=[ClipByNorm(max_norm=2.0)]"),
        ([{"clip_by_norm": 2.0}], "treatments=[ClipByNorm(2.0)]"),
        ("stop", "It is an action, which runs where a rule fires: NonFinite(then=Stop(...))"),
        ([Stop()], "stop is an action, which runs where a rule fires"),
        ("surgery", "give it as `surgery=`"),
        (Surgery("pcgrad"), "give it as `surgery=`"),
        (1.0, "such as ClipByGlobalNorm(1.0). Got 1.0."),
        (SkipStep, "Got the class SkipStep; did you forget the brackets?"),
    ],
    ids=str,
)
def test_a_treatment_spelt_as_elsewhere_is_told_its_cure(given, cure) -> None:
    model = net()
    with pytest.raises(ConfigError) as told:
        Watch(model, OPTIMIZERS["adamw"](model.parameters()), treatments=given)
    assert cure in str(told.value)


def test_a_treatment_that_needs_no_settings_goes_by_its_name() -> None:
    model = net()
    with Watch(model, OPTIMIZERS["adamw"](model.parameters()), treatments=["skip_step", "zclip"]) as watch:
        assert [t.name for t in watch.session.settings.treatments] == ["skip_step", "zclip"]


class Raising(Rule):
    """A rule with a mistake."""

    def init(self):
        return {}

    def judge(self, record, state):
        raise ZeroDivisionError("mine")


def test_a_rule_that_raises_is_one_warning_and_the_run_goes_on() -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    watch = Watch(model, optimizer, rules=[Raising(), Exploding()])

    def train() -> None:
        for x, y in batches(5):
            (model(x) - y).square().mean().backward()
            watch.step()
        watch.close()

    with pytest.warns(GradwatchWarning) as caught:
        train()
    assert len([w for w in caught if "raising" in str(w.message)]) == 1
    assert len(watch.history) == 5


def test_a_lower_learning_rate_ends_by_itself_and_no_scheduler_sees_it() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rules = [NonFinite(then=[LowerLearningRate(0.1, steps=2), SkipStep()])]
    moved = []
    with Watch(model, optimizer, rules=rules, on_error="raise") as watch:
        for i in range(6):
            model.weight.grad = torch.full((1, 1), math.nan if i == 1 else 1.0)
            before = float(model.weight.detach())
            watch.step()
            schedule.step()
            moved.append(before - float(model.weight.detach()))
    # The skipped step is the first of the two; schedules go on meanwhile.
    assert moved == pytest.approx([1.0, 0.0, 0.1 * 0.25, 0.125, 0.0625, 0.03125])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5**6)


def test_a_stop_action_raises_in_a_plain_loop_after_the_step() -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    watch = Watch(model, optimizer, rules=[NonFinite(then=[Stop()])], on_error="raise")
    model[0].weight.grad = torch.full_like(model[0].weight, math.nan)
    with pytest.raises(TrainingStopped, match="non_finite"):
        watch.step()
    watch.close()


def test_state_goes_on_after_a_reload() -> None:
    def run(reload_at: int | None) -> list:
        model = net()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        watch = Watch(model, optimizer, rules="autoclip", on_error="raise")
        for i, (x, y) in enumerate(batches(200)):
            if i == reload_at:
                state = watch.state_dict()
                watch.close()
                watch = Watch(model, optimizer, rules="autoclip", on_error="raise")
                watch.load_state_dict(state)
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean() * (1000 if i == 150 else 1)
            loss.backward()
            watch.step(loss=loss)
        watch.close()
        return [(i.rule, i.first_step, i.value, i.limit, i.treatments) for i in watch.incidents], list(
            model.parameters()
        )

    incidents, params = run(None)
    again, params_again = run(120)
    assert [i[0] for i in incidents] == ["exploding"]
    assert again == incidents
    assert all(torch.equal(a, b) for a, b in zip(params, params_again, strict=True))


def test_bad_input_is_an_error_at_construction_with_the_nearest_names() -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    wrong = [
        ({"rules": "autoclp"}, "Did you mean 'autoclip'"),
        ({"paths": "fc.*"}, "matches 'fc"),
        ({"every": 0}, "`every` must be"),
        ({"activations_every": -1}, "`activations_every` must be"),
        ({"on_error": "ignore"}, "raise, warn"),
        ({"backward": "ful"}, "Did you mean 'full'"),
        ({"memory_limit_mb": math.nan}, "above 0"),
        ({"treatments": [SkipStep]}, "forget the brackets"),
        ({"treatments": ["zclp"]}, "zclip"),
        ({"surgery": "pcgrd"}, "pcgrad"),
        ({"evry": 2}, "Did you mean 'every'"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=r".") as caught:
            Watch(model, optimizer, **options)
        assert message in str(caught.value)
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(ValueError, match="at least one"):
        Watch(model, [])
