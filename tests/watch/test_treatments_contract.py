"""What a treatment of one's own may count on: its place in the order, and that what it did is measured."""

import itertools

import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.rules import Rule
from gradwatch.treatments import (
    BaseTreatment,
    Centralize,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Noise,
    Sanitize,
    Scale,
    SkipStep,
    sort_treatments,
)


class Own(BaseTreatment):
    """Changes gradients as a function says."""

    def __init__(self, change):
        self.change = change

    def apply_(self, grads, context):
        if context.trigger is not False:
            self.change(grads)


def in_place(grads):
    for grad in grads.grads:
        grad.sign_()


def by_data(grads):
    for param in grads.params:
        param.grad.data.sign_()


def by_storage(grads):
    for param in grads.params:
        array = param.grad.numpy()
        array *= 3


def by_another_gradient(grads):
    for param in grads.params:
        param.grad = torch.full_like(param.grad, 2.0)


def by_replacing(grads):
    for i, tensor in enumerate(grads.tensors):
        grads.replace_(i, torch.ones_like(tensor))


def by_taking_one_away(grads):
    grads.params[0].grad = None


def by_taking_all_away(grads):
    for param in grads.params:
        param.grad = None


def of_a_selection(grads):
    for grad in grads.select("*.bias").grads:
        grad.fill_(5.0)


def in_place_and_by_the_collection(grads):
    grads.mul_(0.5)
    in_place(grads)
    grads.mul_(3.0)


def then_fails(grads):
    in_place(grads)
    grads.mul_(2.0)
    next(iter(grads.tensors)).zero_()


CHANGES = [
    in_place,
    by_data,
    by_storage,
    by_another_gradient,
    by_replacing,
    by_taking_one_away,
    by_taking_all_away,
    of_a_selection,
    in_place_and_by_the_collection,
    then_fails,
]


class Fires(Rule):
    """Fires at every step."""

    severity: str = "info"
    needs = frozenset({"grad_norm"})

    def judge(self, record, state):
        return self.whole(record, True, 1.0, 0.0), state


def model_and_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.0)


def true_norm(model):
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return float(torch.cat(grads).norm()) if grads else 0.0


@pytest.mark.parametrize("behind_a_rule", [False, True], ids=["every-step", "behind-a-rule"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_what_a_treatment_did_is_on_record_however_it_did_it(change, behind_a_rule) -> None:
    model, optimizer = model_and_optimizer()
    own = Own(change)
    given = {"rules": [Fires(then=own)]} if behind_a_rule else {"rules": [], "treatments": [own]}
    with Watch(model, optimizer, on_error="raise", **given) as watch:
        for _ in range(3):
            model(torch.eye(4)).square().sum().backward()
            before = true_norm(model)
            record = watch.step().record
            after = true_norm(model)
            optimizer.zero_grad()
            assert record.global_norm == pytest.approx(before, rel=1e-5)
            assert record.global_norm_after == pytest.approx(after, rel=1e-5)
            assert record.treatments[0].after == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_clip_after_a_treatment_of_ones_own_clips_what_is_there(change) -> None:
    model, optimizer = model_and_optimizer()
    own = Own(change)
    with Watch(model, optimizer, rules=[], treatments=[ClipByGlobalNorm(0.25), own], on_error="raise") as watch:
        model(torch.eye(4)).square().sum().backward()
        watch.step()
        # Both are clips of the whole: those of one place keep the order they were given in.
        record = watch.history[0]
        assert [t.name for t in record.treatments] == ["clip_by_global_norm", "own"]
    model, optimizer = model_and_optimizer()
    with Watch(model, optimizer, rules=[], treatments=[own, ClipByGlobalNorm(0.25)], on_error="raise") as watch:
        model(torch.eye(4)).square().sum().backward()
        watch.step()
        assert true_norm(model) <= 0.25 * (1 + 1e-6)
        assert watch.history[0].global_norm_after == pytest.approx(true_norm(model), rel=1e-5)


LAW = [Sanitize(), SkipStep(), Scale(2.0), Centralize(), ClipByNorm(1.0), ClipByValue(0.1), ClipByGlobalNorm(0.3)]
LAW = [*LAW, Noise(eta=0.01)]


@pytest.mark.parametrize("given", [LAW[::-1], LAW, LAW[3:] + LAW[:3], LAW[::2] + LAW[1::2]], ids=str)
def test_treatments_run_in_the_order_of_the_law_whatever_the_order_they_are_given_in(given) -> None:
    model, optimizer = model_and_optimizer()
    with Watch(model, optimizer, rules=[], treatments=given, on_error="raise") as watch:
        model(torch.eye(4)).square().sum().backward()
        record = watch.step().record
    assert [t.name for t in record.treatments] == [t.name for t in LAW] == [t.name for t in sort_treatments(given)]


@pytest.mark.parametrize(
    ("first", "second"), itertools.combinations(LAW[:-1], 2), ids=lambda t: t.name if hasattr(t, "name") else str(t)
)
def test_one_every_step_and_one_behind_a_rule_keep_the_order_too(first, second) -> None:
    names = []
    for at_every_step, behind in ((first, second), (second, first)):
        model, optimizer = model_and_optimizer()
        options = {"rules": [Fires(then=behind)], "treatments": [at_every_step], "on_error": "raise"}
        with Watch(model, optimizer, **options) as watch:
            model(torch.eye(4)).square().sum().backward()
            names.append([t.name for t in watch.step().record.treatments])
    assert names[0] == names[1] == [first.name, second.name]
