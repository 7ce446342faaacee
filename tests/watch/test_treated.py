"""Treatments act in the same step, skips leave everything as documented, and failures never fail open."""

import copy
import math

import pytest
import torch
from torch import nn

from gradwatch import GradwatchWarning, Watch
from gradwatch.errors import TrainingStopped
from gradwatch.rules import Exploding, NonFinite, Rule
from gradwatch.treatments import ClipByGlobalNorm, LowerLearningRate, SkipStep, Stop

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
                assert treated == (record.global_norm > 0.1001)
        return list(model.parameters())

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


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
