"""Which change wins: planted causes, the measure, the order, the report."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradwatch
from gradwatch import ConfigError, WhatIf
from gradwatch.records import Tried, gain_of
from gradwatch.trials import Change
from gradwatch.trials._score import unexplained


def batches(count=30, size=32):
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        x = torch.randn(size, 8, generator=generator)
        found.append((x, (x[:, :4].sum(1) > 0).long() + (x[:, 4] > 0).long()))
    return found


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))


def sgd(model, lr=0.3, **more):
    return torch.optim.SGD(model.parameters(), lr=lr, **more)


def winner(model, optimizer, loss_fn=F.cross_entropy, given=None, **more):
    found = gradwatch.what_if(model, optimizer, loss_fn, given or batches(), seconds=600, **more)
    return "" if found.winner is None else found.winner.name


def misplaced():
    return [(x, y.roll(1)) for x, y in batches()]


def with_nan():
    given = batches()
    for x, _ in given[::3]:
        x[0, 0] = math.nan
    return given


def large():
    return [(x * 1000 + 5000, y) for x, y in batches()]


def dead():
    model = net()
    with torch.no_grad():
        model[0].bias.fill_(-50)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cause", "make"),
    [
        ("weight decay 0", lambda m: (m, sgd(m, weight_decay=1.0), F.cross_entropy, None)),
        ("epsilon 1e-08", lambda m: (m, torch.optim.Adam(m.parameters(), 1e-2, eps=0.1), F.cross_entropy, None)),
        ("learning rate x 100", lambda m: (m, sgd(m, 1e-3), F.cross_entropy, None)),
        ("learning rate / 10", lambda m: (m, torch.optim.Adam(m.parameters(), 1.0), F.cross_entropy, None)),
        ("rows re-aligned by -1", lambda m: (m, sgd(m), F.cross_entropy, misplaced())),
        ("finite inputs", lambda m: (m, sgd(m), F.cross_entropy, with_nan())),
        ("normalised inputs", lambda m: (m, sgd(m), F.cross_entropy, large())),
        ("loss negated", lambda m: (m, sgd(m), lambda outputs, targets: -F.cross_entropy(outputs, targets), None)),
        (
            "loss averaged",
            lambda m: (
                m,
                sgd(m, 1.0),
                lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="sum"),
                None,
            ),
        ),
        (
            "logits for the loss",
            lambda m: (m, sgd(m), lambda outputs, targets: F.cross_entropy(outputs.softmax(1), targets), None),
        ),
        (
            "all parameters in the optimizer",
            lambda m: (m, torch.optim.SGD([m[2].bias], 0.3), F.cross_entropy, None),
        ),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_the_planted_cause_wins(cause, make) -> None:
    assert winner(*make(net())) == cause


def test_dead_units_are_cured_by_new_weights() -> None:
    model = dead()
    assert winner(model, sgd(model), changes=["learning rate / 10", "initialised again", "weight decay 0"]) == (
        "initialised again"
    )


def test_a_healthy_training_has_nothing_to_repair() -> None:
    model = net()
    found = gradwatch.what_if(model, sgd(model), F.cross_entropy, batches(), seconds=600)
    assert not [each.name for each in found.tried if each.cures and each.kind != "setting"]


def test_a_plain_step_cures_a_loop_that_resets_gradients_too_early() -> None:
    model = net()

    def train_step(model, optimizer, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.zero_grad()
        optimizer.step()
        return loss

    changes = ["learning rate / 10", "a plain step", "learning rate x 10"]
    assert winner(model, sgd(model), train_step=train_step, changes=changes) == "a plain step"


def test_eval_mode_is_overruled_whoever_asks_for_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        model[1].running_var.fill_(1e6)

    def loss_fn(model, batch):
        model.eval()
        return F.cross_entropy(model(batch[0]), batch[1])

    model.eval()
    assert winner(model, sgd(model), loss_fn, changes=["train mode", "learning rate / 10"]) == "train mode"
    assert not any(m.training for m in model.modules())


def test_a_change_of_ones_own_may_be_the_winner() -> None:
    class Wider(Change):
        name, kind, cause = "inputs back in range", "repair", "inputs are divided twice"

        def apply(self, trial) -> None:
            trial.on_batch.append(lambda batch: (batch[0] * 1e4, batch[1]))

    model, given = net(), [(x / 1e4, y) for x, y in batches()]
    assert winner(model, sgd(model), given=given, changes=[Wider(), "learning rate / 10"]) == "inputs back in range"


def test_no_time_leaves_changes_untried_and_says_so() -> None:
    model = net()

    class Slow(Change):
        name = "slow"

        def apply(self, trial) -> None:
            trial.before_step.append(lambda step: __import__("time").sleep(0.3))

    found = gradwatch.what_if(
        model, sgd(model), F.cross_entropy, batches(), changes=[Slow(), "learning rate / 10"], seconds=1
    )
    assert found.not_tried == {
        "slow": "the 1 seconds were over",
        "learning rate / 10": "the 1 seconds were over",
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory_limit_mb": 1e-4}, "what_if: copies of the model, its gradients and the optimizer's state take"),
        ({"batches": iter(batches(2))}, "what_if: `batches` is an iterator"),
        ({"batches": []}, "what_if: `batches` holds no batch."),
        ({"changes": ["learning rate"]}, "what_if: there is no change 'learning rate'. Did you mean"),
        ({"changes": [3]}, "what_if: `changes` takes changes or their names. Got 3."),
        ({"changes": ["unclipped", "unclipped"]}, "what_if: two changes are called 'unclipped'"),
        ({"steps": 0}, "what_if: `steps` must be a whole number, 1 or more. Got 0."),
        ({"seconds": 0}, "what_if: `seconds` must be above 0. Got 0."),
        ({"loss_fn": 3}, "what_if: `loss_fn` must be callable, or None. Got int."),
        ({"model": 3}, "what_if: `model` must be a module. Got int."),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_cannot_be_is_said_at_once(given, message) -> None:
    model = net()
    named = {"model": model, "optimizer": sgd(model), "loss_fn": F.cross_entropy, "batches": batches(2), **given}
    with pytest.raises(ConfigError) as error:
        gradwatch.what_if(**named)
    assert str(error.value).startswith(message)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ConfigError, match=r"weights are not finite \('0.weight' among them\)"):
        gradwatch.what_if(model, sgd(model), F.cross_entropy, batches(2))


def test_unexplained_is_the_same_for_logits_probabilities_and_any_scale() -> None:
    torch.manual_seed(0)
    z, y = torch.randn(400, 4, dtype=torch.float64) * 2, torch.randint(0, 4, (400,))
    z[torch.arange(400), y] += 2.0
    plain = unexplained([(z, y)])
    assert 0.1 < plain < 0.9
    assert unexplained([(z * 50, y)]) == pytest.approx(plain, abs=1e-9)
    # Never above a guess, and not above the loss of the logits as they are.
    assert plain <= float(F.cross_entropy(z, y)) / math.log(4) + 1e-3
    assert unexplained([(torch.zeros(400, 4), y)]) == 1.0
    assert unexplained([(F.one_hot(y, 4).double() * 100, y)]) < 1e-3
    assert math.isnan(unexplained([(z * math.nan, y)]))


def test_unexplained_of_numbers_is_one_minus_the_squared_rank_correlation() -> None:
    rng = np.random.RandomState(0)
    x = rng.randn(200)
    y = x + rng.randn(200)
    ranks = [np.argsort(np.argsort(a)).astype(float) for a in (x, y)]
    expected = 1 - np.corrcoef(*ranks)[0, 1] ** 2
    pair = (torch.tensor(x)[:, None], torch.tensor(y)[:, None])
    assert unexplained([pair]) == pytest.approx(expected, abs=1e-12)
    assert unexplained([(pair[0].exp(), pair[1] * 1e4 - 7)]) == pytest.approx(expected, abs=1e-12)
    assert unexplained([(-pair[1], pair[1])]) == 1.0


def test_gain_is_a_share_of_what_the_training_leaves() -> None:
    assert gain_of(0.25, 0.5, measure="unexplained", start=1.0) == 0.5
    assert gain_of(math.nan, 0.5, measure="unexplained", start=1.0) == -math.inf
    assert gain_of(1.0, math.nan, measure="unexplained", start=1.0) == 0.5
    assert gain_of(-2.0, -1.0, measure="loss", start=-1.0) == 1.0


def told(name, gain, kind="setting", **more):
    return Tried(name=name, kind=kind, gain=gain, left=1 - gain, losses=(1.0, 0.5), cause="c", advice="Do.", **more)


def test_a_repair_comes_before_a_setting_that_gains_little_more() -> None:
    some = [told("rate", 0.5), told("eps", 0.4, "repair"), told("decay", 0.01, "repair"), told("part", 0.45, "part")]
    found = WhatIf.ranked(told("", 0.0), some, steps=20)
    assert [each.name for each in found.tried] == ["eps", "part", "rate", "decay"]
    assert WhatIf.ranked(told("", 0.0), [told("rate", 0.9), told("eps", 0.1, "repair")]).winner.name == "rate"
    assert WhatIf.ranked(told("", 0.0), [told("rate", 0.05)]).winner is None


def test_the_report_goes_round_through_plain_values_and_prints() -> None:
    control = told("", 0.0, is_finite=False)
    found = WhatIf.ranked(
        control, [told("<b>", 0.6, "part", beside="rate"), told("b", -math.inf)], steps=20, before=1.0
    )
    again = WhatIf.from_dict(found.to_dict())
    assert again.to_dict() == found.to_dict()
    assert again.winner.cures
    assert "“<b> (beside rate)” cures it" in str(found)
    assert "&lt;b&gt;" in found._repr_html_()
    assert "<b> (" not in found._repr_html_()
    assert found.sentence().endswith("where the training as it is is not finite. So c. Do.")
