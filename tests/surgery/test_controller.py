"""The mechanism: probes, weights, one ordinary backward."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigError, UnknownNameError, UnknownPathError
from gradwatch.treatments.surgery import Surgery, SurgeryController, collecting, split, weights

from .conftest import TwoHeads, batches, gradients, task_gramian


def ones(gramian: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(gramian))


def run(surgery: Surgery | None, *, steps: int = 12, parts: int = 1, penalty: float = 0.0, b_factor: float = 1.0):
    """A plain loop driven as an engine drives it. Returns the model, its controller and the scalars of each step."""
    model = TwoHeads()
    controller = SurgeryController(surgery, model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    reports = []
    for step in range(steps):
        for part in range(parts):
            controller.step = step
            with collecting(controller):
                a, b = model.losses(*batches()[(step * parts + part) % 8])
                loss = split(a=a, b=b) if b_factor == 1 else a + b_factor * b
                if b_factor != 1:
                    controller.begin({"a": a, "b": b})
            loss = loss + penalty * sum(p.pow(2).sum() for p in model.trunk.parameters())
            loss = loss / parts
            controller.before_backward(loss, grad_scale=1 / parts)
            loss.backward()
            controller.after_backward()
        reports.append(controller.report())
        optimizer.step()
        optimizer.zero_grad()
    return model, controller, reports


def by_hand(method="pcgrad", *, steps: int = 12, parts: int = 1, penalty: float = 0.0, b_factor: float = 1.0):
    """The loop that a user would write: task gradients, weights, backward of the weighted loss."""
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    shared = list(model.trunk.parameters())
    for step in range(steps):
        for part in range(parts):
            a, b = model.losses(*batches()[(step * parts + part) % 8])
            w = (1.0, 1.0)
            if method is not None:
                w = weights(method, task_gramian((a, b_factor * b), shared), step=step).tolist()
            loss = w[0] * a + w[1] * b if b_factor == 1 else w[0] * a + w[1] * (b_factor * b)
            loss = (loss + penalty * sum(p.pow(2).sum() for p in shared)) / parts
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def different(model: nn.Module, other: nn.Module) -> list[str]:
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    return [name for (name, p), q in pairs if not torch.equal(p, q)]


@pytest.mark.parametrize("loop", [{}, {"parts": 2}, {"penalty": 1e-3}], ids=["plain", "accumulated", "penalty"])
def test_pcgrad_is_bitwise_a_loop_written_by_hand(loop) -> None:
    model, _, reports = run(Surgery("pcgrad", keep_length=False), **loop)
    assert any(r["surgery_applied"] > 0 for r in reports)
    assert different(model, by_hand(**loop)) == []


@pytest.mark.parametrize("keep_length", [True, False])
def test_surgery_with_weights_of_one_is_bitwise_the_plain_run(keep_length) -> None:
    model, _, _ = run(Surgery(ones, keep_length=keep_length))
    assert different(model, by_hand(None)) == []


def test_diagnosis_alone_is_bitwise_the_plain_run() -> None:
    model, controller, _ = run(None)
    assert different(model, by_hand(None)) == []
    assert controller.report() == {}


@pytest.mark.parametrize("method", ["upgrad", "cagrad", "mgda", "nash_mtl", "imtl_g", "aligned_mtl", "config"])
def test_methods_equal_a_loop_written_by_hand(method) -> None:
    model, _, _ = run(Surgery(method, keep_length=False), steps=6)
    other = by_hand(method, steps=6)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_how_a_task_counts_in_the_users_loss_is_part_of_its_gradient() -> None:
    model, _, reports = run(Surgery("pcgrad", keep_length=False), b_factor=0.3)
    assert any(r["surgery_applied"] > 0 for r in reports)
    other = by_hand(b_factor=0.3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_direct_combination_equals_the_weighted_backward() -> None:
    model, _, reports = run(Surgery("pcgrad", combine="direct", keep_length=False), penalty=1e-3, parts=2)
    assert any(r["surgery_applied"] > 0 for r in reports)
    other = by_hand(penalty=1e-3, parts=2)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def one_backward(surgery: Surgery, *, batch: int = 0) -> tuple[TwoHeads, dict[str, float]]:
    model = TwoHeads()
    controller = SurgeryController(surgery, model.named_parameters())
    a, b = model.losses(*batches()[batch])
    controller.backward({"a": a, "b": b})
    return model, controller.report()


@pytest.mark.parametrize("combine", ["backward", "direct"])
def test_plain_heads_train_as_without_surgery(combine) -> None:
    model, report = one_backward(Surgery("mgda", heads="plain", keep_length=False, combine=combine))
    plain = TwoHeads()
    a, b = plain.losses(*batches()[0])
    shared = list(plain.trunk.parameters())
    w = weights("mgda", task_gramian((a, b), shared)).tolist()
    assert report["surgery_weight/a"] == pytest.approx(w[0])
    trunk = torch.autograd.grad(w[0] * a + w[1] * b, shared, retain_graph=True)
    (a + b).backward()
    for p, q in zip(
        [*model.a.parameters(), *model.b.parameters()], [*plain.a.parameters(), *plain.b.parameters()], strict=True
    ):
        torch.testing.assert_close(p.grad, q.grad)
    for p, g in zip(model.trunk.parameters(), trunk, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-7)


def test_keep_length_gives_the_length_of_the_sum() -> None:
    for method in ("upgrad", "nash_mtl", "mgda", "cagrad", "pcgrad"):
        _, report = one_backward(Surgery(method))
        assert report["surgery_length_ratio"] == pytest.approx(1, rel=1e-9), method


def test_length_of_a_cancelled_rest_is_not_stretched() -> None:
    from gradwatch.treatments.surgery._decide import keep_sum_length

    rows = torch.tensor([[1.0, 1e-7], [-2.0, 1e-7]], dtype=torch.float64)
    G = rows @ rows.T
    w = weights("mgda", G)
    assert float((keep_sum_length(G, w) @ rows).norm()) < 1e-2


def test_gramian_of_the_last_layer_is_that_of_its_parameters() -> None:
    _, report = one_backward(Surgery("pcgrad", gramian="last"))
    fresh = TwoHeads()
    G = task_gramian(fresh.losses(*batches()[0]), [fresh.trunk[2].weight, fresh.trunk[2].bias])
    assert report["task_norm/a"] == pytest.approx(float(G[0, 0].sqrt()))
    assert report["task_cos/a/b"] == pytest.approx(float(G[0, 1] / (G[0, 0] * G[1, 1]).sqrt()))


def test_gramian_of_the_features_is_that_of_the_last_shared_tensor() -> None:
    _, report = one_backward(Surgery("pcgrad", gramian="features"))
    fresh = TwoHeads()
    x, ya, yb = batches()[0]
    shared = fresh.trunk(x)
    ga, gb = (
        torch.autograd.grad(loss, shared)[0].double()
        for loss in (
            (fresh.a(shared).squeeze(1) - ya).pow(2).mean(),
            5 * (fresh.b(shared).squeeze(1) - yb).pow(2).mean(),
        )
    )
    assert report["task_cos/a/b"] == pytest.approx(float((ga * gb).sum() / ga.norm() / gb.norm()), rel=1e-6)
    assert report["task_norm/b"] == pytest.approx(float(gb.norm()))


def test_features_upstream_of_another_shared_tensor_are_left_out() -> None:
    """Decoders with skip connections: the encoder's output alone, no pass through the encoder."""
    from gradwatch.treatments.surgery._graph import shared_features

    encoder = [nn.Linear(4, 4) for _ in range(2)]
    first = encoder[0](torch.randn(3, 4)).tanh()
    second = encoder[1](first).tanh()
    losses = [(second * first).sum(), (second - first).pow(2).sum()]
    (edge,) = shared_features(losses)
    assert edge.node is second.grad_fn


def test_tied_weights_used_by_both_heads_are_shared() -> None:
    model = TwoHeads()
    model.b.weight = model.a.weight
    controller = SurgeryController(Surgery("pcgrad"), model.named_parameters())
    controller.backward(dict(zip("ab", model.losses(*batches()[0]), strict=True)))
    fresh = TwoHeads()
    fresh.b.weight = fresh.a.weight
    G = task_gramian(fresh.losses(*batches()[0]), [*fresh.trunk.parameters(), fresh.a.weight])
    assert controller.report()["task_norm/a"] == pytest.approx(float(G[0, 0].sqrt()))


def test_shared_pattern_restricts_the_gramian() -> None:
    _, report = one_backward(Surgery("pcgrad", shared="trunk.0"))
    fresh = TwoHeads()
    G = task_gramian(fresh.losses(*batches()[0]), list(fresh.trunk[0].parameters()))
    assert report["task_norm/a"] == pytest.approx(float(G[0, 0].sqrt()))


def test_frozen_parameters_take_no_part() -> None:
    model = TwoHeads()
    model.trunk[0].requires_grad_(False)
    controller = SurgeryController(Surgery("pcgrad", combine="direct"), model.named_parameters())
    controller.backward(dict(zip("ab", model.losses(*batches()[0]), strict=True)))
    assert model.trunk[0].weight.grad is None
    assert model.trunk[2].weight.grad is not None


def test_conflict_gate_leaves_agreeing_steps_alone() -> None:
    agreeing, conflicting = TwoHeads(), TwoHeads()
    with torch.no_grad():
        agreeing.b.weight.neg_()
        agreeing.b.bias.neg_()
    for model, expected in ((agreeing, 0.0), (conflicting, 1.0)):
        controller = SurgeryController(Surgery("mgda", when="conflict"), model.named_parameters())
        controller.backward(dict(zip("ab", model.losses(*batches()[0]), strict=True)))
        report = controller.report()
        assert report["conflict_rate"] == report["surgery_applied"] == expected


def test_every_nth_step_has_surgery_and_the_others_none() -> None:
    _, _, reports = run(Surgery("mgda", when=4), steps=9)
    assert [bool(r) for r in reports] == [i % 4 == 0 for i in range(9)]


def test_diagnosis_comes_at_its_cadence() -> None:
    model = TwoHeads()
    controller = SurgeryController(None, model.named_parameters(), diagnose_every=3, diagnose_gramian="params")
    seen = []
    for step in range(7):
        controller.step = step
        a, b = model.losses(*batches()[step])
        controller.backward({"a": a, "b": b})
        seen.append(controller.report())
    assert [bool(r) for r in seen] == [i % 3 == 0 for i in range(7)]
    assert set(seen[0]) == {"task_norm/a", "task_norm/b", "task_cos/a/b", "task_similarity/a/b", "conflict_rate"}


def test_report_of_accumulated_micro_batches_is_their_mean() -> None:
    model = TwoHeads()
    controller = SurgeryController(Surgery("pcgrad"), model.named_parameters())
    norms = []
    for batch in batches()[:2]:
        a, b = model.losses(*batch)
        norms.append(float(task_gramian((a, b), list(model.trunk.parameters()))[0, 0].sqrt()))
        controller.backward({"a": a, "b": b})
    assert controller.report()["task_norm/a"] == pytest.approx(sum(norms) / 2)
    assert controller.report() == {}


@pytest.mark.parametrize("gramian", ["params", "last", "features"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_task_falls_back_to_the_sum_and_says_so(bad, gramian) -> None:
    model = TwoHeads()
    controller = SurgeryController(Surgery("gradvac", gramian=gramian), model.named_parameters())
    a, b = model.losses(*batches()[0])
    controller.backward({"a": a * bad, "b": b})
    report = controller.report()
    assert report["surgery_fallback"] == 1
    assert report["surgery_weight/a"] == report["surgery_weight/b"] == 1
    assert not torch.isfinite(torch.tensor(report["task_norm/a"]))
    assert report["task_norm/b"] > 0
    assert controller.state_dict()["method"]["targets"] is None
    controller.backward(dict(zip("ab", model.losses(*batches()[1]), strict=True)))
    assert controller.report()["surgery_fallback"] == 0


def test_a_method_that_fails_numerically_falls_back_to_the_sum() -> None:
    _, report = one_backward(Surgery(lambda G: torch.full((len(G),), float("nan"))))
    assert report["surgery_fallback"] == 1
    assert report["surgery_weight/a"] == 1


def test_gradvac_resumes_where_it_was() -> None:
    def steps(controller, model, chosen):
        found = []
        for i in chosen:
            controller.step = i
            controller.backward(dict(zip("ab", model.losses(*batches()[i]), strict=True)))
            found.append(controller.report()["surgery_weight/a"])
        return found

    model = TwoHeads()
    surgery = Surgery("gradvac", beta=0.5, keep_length=False)
    whole = steps(SurgeryController(surgery, model.named_parameters()), model, range(8))
    first = SurgeryController(surgery, model.named_parameters())
    steps(first, model, range(4))
    second = SurgeryController(surgery, model.named_parameters())
    second.load_state_dict(first.state_dict())
    assert steps(second, model, range(4, 8)) == whole[4:]


def test_state_loads_with_weights_only(tmp_path) -> None:
    model = TwoHeads()
    controller = SurgeryController(Surgery("gradvac"), model.named_parameters())
    controller.backward(dict(zip("ab", model.losses(*batches()[0]), strict=True)))
    torch.save(controller.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["method"]["targets"].shape == (2, 2)


def test_probing_is_true_during_probes_alone() -> None:
    model = TwoHeads()
    controller = SurgeryController(Surgery("pcgrad"), model.named_parameters())
    seen = []
    a, b = model.losses(*batches()[0])
    model.trunk[0].weight.register_hook(lambda g: seen.append(controller.probing))
    controller.backward({"a": a, "b": b})
    assert seen == [True, True, False]


def test_probes_touch_no_grad_and_no_random_number() -> None:
    model = TwoHeads()
    controller = SurgeryController(Surgery("pcgrad"), model.named_parameters())
    a, b = model.losses(*batches()[0])
    controller.begin({"a": a, "b": b})
    state = torch.get_rng_state()
    controller.before_backward(a + b)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_left_behind() -> None:
    model = TwoHeads()
    controller = SurgeryController(Surgery("mgda"), model.named_parameters())
    a, b = model.losses(*batches()[0])
    loss = controller.begin({"a": a, "b": b})
    controller.before_backward(loss)
    assert a._backward_hooks
    loss.backward()
    controller.after_backward()
    assert not a._backward_hooks
    assert not b._backward_hooks
    alive = weakref.ref(a)
    del a, b, loss
    gc.collect()
    assert alive() is None
    controller.close()
    controller.close()


def test_a_backward_that_raises_leaves_no_hook() -> None:
    model = TwoHeads()
    controller = SurgeryController(Surgery("mgda"), model.named_parameters())
    a, b = model.losses(*batches()[0])

    def fail(_: torch.Tensor) -> None:
        if not controller.probing:
            raise RuntimeError("from the user")

    model.trunk[0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="from the user"):
        controller.backward({"a": a, "b": b})
    assert not a._backward_hooks
    assert controller._pending == {}


def test_losses_whose_backward_never_came_are_forgotten_with_the_next_batch() -> None:
    model = TwoHeads()
    controller = SurgeryController(Surgery("pcgrad"), model.named_parameters())
    controller.begin(dict(zip("ab", model.losses(*batches()[0]), strict=True)))
    a, b = model.losses(*batches()[1])
    loss = controller.begin({"a": a, "b": b})
    controller.before_backward(loss)
    assert controller.report()["task_norm/a"] > 0
    controller.after_backward()


def test_switching_on_and_off_takes_effect_with_the_next_batch() -> None:
    model = TwoHeads()
    controller = SurgeryController(None, model.named_parameters())
    applied = []
    for i, surgery in enumerate([None, Surgery("mgda"), None]):
        controller.switch(surgery)
        controller.backward(dict(zip("ab", model.losses(*batches()[i]), strict=True)))
        applied.append(controller.report().get("surgery_applied"))
    assert applied == [None, 1.0, None]


def test_one_task_needs_no_surgery() -> None:
    model = TwoHeads()
    controller = SurgeryController(Surgery("pcgrad"), model.named_parameters())
    controller.backward({"a": model.losses(*batches()[0])[0]})
    assert controller.report() == {}
    assert model.trunk[0].weight.grad is not None


def test_tasks_may_be_absent_from_some_steps() -> None:
    model = TwoHeads()
    controller = SurgeryController(Surgery("pcgrad"), model.named_parameters())
    for present in ("ab", "a", "ab"):
        losses = dict(zip("ab", model.losses(*batches()[0]), strict=True))
        controller.backward({name: losses[name] for name in present})
    assert gradients(model).isfinite().all()


def test_losses_in_two_calls_are_one_step() -> None:
    model = TwoHeads()
    controller = SurgeryController(Surgery("pcgrad"), model.named_parameters())
    with collecting(controller):
        a, b = model.losses(*batches()[0])
        loss = split(a=a) + split(b=b)
    controller.before_backward(loss)
    assert "task_cos/a/b" in controller.report()
    controller.after_backward()


def test_checkpointed_blocks_work_without_reentrance_and_are_named_with_it() -> None:
    from torch.utils.checkpoint import checkpoint

    def losses(reentrant: bool) -> tuple[SurgeryController, dict[str, torch.Tensor]]:
        model = TwoHeads()
        x, ya, _ = batches()[0]
        shared = checkpoint(model.trunk, x.requires_grad_(), use_reentrant=reentrant)
        controller = SurgeryController(Surgery("pcgrad"), model.named_parameters())
        return controller, {"a": (model.a(shared).squeeze(1) - ya).pow(2).mean(), "b": model.b(shared).mean()}

    controller, tasks = losses(False)
    controller.backward(tasks)
    assert controller.report()["task_norm/a"] > 0
    controller, tasks = losses(True)
    with pytest.raises(ConfigError, match=r"use checkpoint\(\.\.\., use_reentrant=False\)"):
        controller.backward(tasks)


def test_loss_entries_of_one_tensor_can_be_tasks() -> None:
    model = TwoHeads()
    # What one tensor's entries depend on can't be told apart, heads included: the shared part is named.
    surgery = Surgery("pcgrad", keep_length=False, shared="trunk")
    controller = SurgeryController(surgery, model.named_parameters())
    both = torch.stack(model.losses(*batches()[0]))
    first, second = both.unbind()
    controller.backward({"a": first, "b": second})
    other, _ = one_backward(Surgery("pcgrad", keep_length=False))
    torch.testing.assert_close(gradients(model), gradients(other))


@pytest.mark.parametrize("name", ["a", "b"])
def test_loss_that_is_not_part_of_the_differentiated_one_is_named(name) -> None:
    model = TwoHeads()
    controller = SurgeryController(Surgery("pcgrad"), model.named_parameters())
    losses = dict(zip("ab", model.losses(*batches()[0]), strict=True))
    controller.begin(losses)
    with pytest.raises(ConfigError, match=f"task '{name}' has no part in the loss"):
        controller.before_backward(losses["b" if name == "a" else "a"] * 2)


def _loss_cases():
    weight = nn.Parameter(torch.ones(3))
    scalar = weight.sum()
    return [
        (
            {"a": 0.5},
            "the loss of task 'a' must be a scalar tensor that is still attached to the graph. "
            "Got float: don't call .item() on it.",
        ),
        ({"a": weight * 2}, "the loss of task 'a' must be a scalar. Got shape (3,): take its mean or sum."),
        (
            {"a": scalar.detach()},
            "the loss of task 'a' has no gradient: it was detached, or computed under no_grad or from frozen "
            "parameters alone. Leave the task out at steps at which it is absent.",
        ),
        ({"a": scalar, "b": scalar}, "tasks 'a' and 'b' are the same tensor, which would count twice."),
        (
            {"a": scalar, "total": scalar + (weight * weight).sum()},
            "the loss of task 'total' is computed from that of 'a', which would count twice. "
            "Give the separate terms, and leave the total out.",
        ),
    ]


@pytest.mark.parametrize(("losses", "message"), _loss_cases(), ids=["number", "vector", "detached", "twice", "total"])
def test_losses_that_can_not_be_tasks_are_named(losses, message) -> None:
    model = TwoHeads()
    controller = SurgeryController(Surgery("pcgrad"), model.named_parameters())
    with pytest.raises(ConfigError) as caught:
        controller.backward(losses)
    assert str(caught.value) == message


def test_tasks_that_share_nothing_are_named() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})
    controller = SurgeryController(Surgery("pcgrad"), model.named_parameters())
    x = torch.randn(3, 2)
    with pytest.raises(ConfigError, match="tasks 'a', 'b' share nothing that requires a gradient"):
        controller.backward({name: model[name](x).mean() for name in "ab"})


def test_direct_combination_wants_all_losses_at_once() -> None:
    model = TwoHeads()
    controller = SurgeryController(Surgery("pcgrad", combine="direct"), model.named_parameters())
    a, b = model.losses(*batches()[0])
    controller.begin({"a": a})
    with pytest.raises(ConfigError, match="all task losses of a step in one split"):
        controller.begin({"b": b})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gramian": "all"}, "`gramian` must be one of params, last, features. Got 'all'."),
        ({"combine": "both"}, "`combine` must be one of backward, direct. Got 'both'."),
        ({"heads": "none"}, "`heads` must be one of weighted, plain. Got 'none'."),
        ({"when": 0}, "`when` must be 'always', 'conflict' or a number of steps >= 1. Got 0."),
        ({"when": "never"}, "`when` must be 'always', 'conflict' or a number of steps >= 1. Got 'never'."),
        (
            {"combine": "direct", "gramian": "last"},
            "combine='direct' needs the probes of gramian='params'. Got gramian='last'.",
        ),
        (
            {"gramian": "features", "shared": "trunk"},
            "gramian='features' finds the tensors that all tasks share in the graph: leave shared='auto'. "
            "Got shared='trunk'.",
        ),
    ],
)
def test_settings_are_checked(settings, message) -> None:
    with pytest.raises(ConfigError) as caught:
        Surgery("pcgrad", **settings)
    assert str(caught.value) == message


def test_unknown_names_are_known_when_surgery_is_made() -> None:
    with pytest.raises(UnknownNameError, match="no surgery method 'nash'"):
        Surgery("nash")
    with pytest.raises(UnknownNameError, match="no option of pcgrad 'c'"):
        Surgery("pcgrad", c=0.5)
    with pytest.raises(UnknownPathError, match="no parameter path that matches 'trnk'"):
        SurgeryController(Surgery("pcgrad", shared="trnk"), TwoHeads().named_parameters())


def test_surgery_behind_a_rule_asks_to_be_switched_on() -> None:
    from gradwatch.protocols import Action
    from gradwatch.records import Incident
    from gradwatch.requests import SwitchSurgery

    class Listener:
        def __init__(self) -> None:
            self.requests = []

        def request(self, request) -> None:
            self.requests.append(request)

    surgery = Surgery("pcgrad")
    assert isinstance(surgery, Action)
    listener = Listener()
    surgery.act(Incident(rule="grad_conflict", first_step=3, last_step=5), listener)
    (request,) = listener.requests
    assert isinstance(request, SwitchSurgery)
    assert request.surgery is surgery


@pytest.mark.slow
@pytest.mark.parametrize("gramian", ["params", "last", "features"])
def test_a_compiled_trunk_is_probed_as_the_eager_one(gramian) -> None:
    model = TwoHeads()
    trunk = torch.compile(model.trunk, backend="aot_eager")
    controller = SurgeryController(Surgery("pcgrad", gramian=gramian), model.named_parameters())
    x, ya, yb = batches()[0]
    shared = trunk(x)
    a, b = (model.a(shared).squeeze(1) - ya).pow(2).mean(), 5 * (model.b(shared).squeeze(1) - yb).pow(2).mean()
    controller.backward({"a": a, "b": b})
    _, eager = one_backward(Surgery("pcgrad", gramian=gramian))
    assert controller.report()["task_cos/a/b"] == pytest.approx(eager["task_cos/a/b"], rel=1e-5)
