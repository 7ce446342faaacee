"""The same batch gives the same gradient: what does not is found, and nothing of the run changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradwatch import Watch
from gradwatch.errors import ConfigError, GradwatchWarning

from .training import batch, network, train, weak_network

RULES = ["recomputation_differs"]
OPTIONS = {"rules": {"rules": RULES}, "recompute_every": 4, "on_error": "raise"}


def watched(model: nn.Module, **options) -> Watch:
    return Watch(model, torch.optim.Adam(model.parameters(), 1e-3), **{**OPTIONS, **options})


def fit(model: nn.Module, *, at: int = -1, bit: int = 0, steps: int = 14, parts: int = 1, **options) -> Watch:
    def before(step: int) -> None:
        if step == at:
            model[0].bits.append(bit)

    with watched(model, **options) as watch:
        train(watch, model, steps, parts=parts, before=before)
    return watch


@pytest.mark.parametrize("bit", [0, 1, 12, 22, 23, 30, 31])
def test_a_bit_flipped_in_one_gradient_is_found_and_placed(bit: int) -> None:
    watch = fit(weak_network(), at=12, bit=bit)
    assert [(i.rule, i.first_step, i.paths) for i in watch.incidents] == [("recomputation_differs", 12, ("0.weight",))]
    record = watch.history[12]
    assert record["recompute_elements", "0.weight"] == 1
    assert record.scalars["recompute_differs"] == 1
    assert "1 elements differ (rank 0)" in watch.incidents[0].message


def test_it_is_found_where_only_checksums_fit_in_memory() -> None:
    watch = fit(weak_network(), at=12, bit=3, memory_limit_mb=1e-4)
    assert [i.paths for i in watch.incidents] == [("0.weight",)]


def test_it_is_found_in_one_of_several_micro_batches_under_a_loss_scaler() -> None:
    model, scaler = weak_network(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watched(model, scaler=scaler) as watch:
        for step in range(14):
            if step == 12:
                model[0].bits.append(18)  # a lower one may be rounded away in the sum
            x, y = batch(step)
            for inputs, targets in zip(x.chunk(4), y.chunk(4), strict=True):
                loss = F.cross_entropy(model(inputs), targets) / 4
                scaler.scale(loss).backward()
            watch.step(loss)
            watch.optimizers[0].zero_grad()
    assert [(i.first_step, i.paths) for i in watch.incidents] == [(12, ("0.weight",))]


@pytest.mark.parametrize("parts", [1, 2])
def test_healthy_steps_come_out_the_same_and_nothing_of_the_run_changes(parts: int) -> None:
    def run(**options):
        model = network()
        watch = fit(model, parts=parts, **options)
        return watch, [*model.parameters(), *model.buffers(), torch.get_rng_state()]

    (on, values), (off, bare) = run(), run(recompute_every=None)
    assert all(torch.equal(a, b) for a, b in zip(values, bare, strict=True))
    told = [r.step for r in on.history if r.scalars.get("recompute_differs") == 0]
    assert told == [0, 1, 2, 4, 8, 12]
    assert not on.incidents
    assert not any("recompute_differs" in r.scalars for r in off.history)
    assert all(not p._post_accumulate_grad_hooks for p in on.session.model.parameters())


def test_a_model_that_gives_its_loss_beside_other_outputs_comes_out_the_same() -> None:
    class WithLoss(nn.Linear):
        def forward(self, x, y):
            logits = super().forward(x)
            return {"logits": logits, "loss": F.cross_entropy(logits, y)}

    model = WithLoss(6, 3)
    with watched(model) as watch:
        for step in range(6):
            model(*batch(step))["loss"].backward()
            watch.step()
            watch.optimizers[0].zero_grad()
    told = {r.step: r.scalars["recompute_differs"] for r in watch.history if "recompute_differs" in r.scalars}
    assert told == {0: 0, 1: 0, 2: 0, 4: 0}
    assert all(watch.history[step]["recompute_elements", "weight"] == 0 for step in told)


class Forgetful(nn.Module):
    """Its output depends on how often it was called: nothing that is run again can be the same."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(6, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * (1 + 0.1 * self.calls)


class Regularised(nn.Module):
    """Spectral norm: a buffer that each forward pass changes, and that its output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))

    def forward(self, x):
        return self.linear(x)


def test_what_never_comes_out_the_same_is_no_fault() -> None:
    watch = fit(Forgetful())
    assert not watch.incidents
    assert all(r.scalars.get("recompute_differs", 0) == 0 for r in watch.history)
    assert watch.history[-2].scalars["recompute_noise"] > 0


def test_buffers_that_forward_depends_on_begin_as_they_did() -> None:
    torch.manual_seed(0)
    watch = fit(Regularised())
    assert not watch.incidents
    assert [r.scalars["recompute_differs"] for r in watch.history if r.step in (4, 8, 12)] == [0.0, 0.0, 0.0]


def test_a_parameter_with_a_part_of_its_own_in_the_loss_is_not_judged() -> None:
    model = network()
    with watched(model) as watch:
        for step in range(14):
            x, y = batch(step)
            (F.cross_entropy(model(x), y) + model[4].weight.square().sum()).backward()
            watch.step()
            watch.optimizers[0].zero_grad()
    assert not watch.incidents
    assert not watch.history[12].measured("recompute_elements")[list(watch.history[12].index.paths).index("4.weight")]
    assert watch.history[12]["recompute_elements", "0.weight"] == 0


class Noisy(nn.Module):
    """A layer that rounds otherwise each time, as kernels that add up in any order do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.size = nn.Linear(6, 3), 1e-6
        self.made = torch.Generator().manual_seed(1)

    def forward(self, x):
        return self.linear(x * (1 + self.size * torch.randn(x.shape, generator=self.made)))


@pytest.mark.parametrize("is_faulty", [True, False])
def test_beyond_the_noise_of_several_runs_a_difference_is_found(is_faulty: bool) -> None:
    model = Noisy()
    with watched(model) as watch:
        for step in range(18):
            x, y = batch(step)
            out = model(x)
            if is_faulty and step == 16:
                out.register_hook(lambda g: g * 1.01)
            F.cross_entropy(out, y).backward()
            watch.step()
            watch.optimizers[0].zero_grad()
    assert bool(watch.incidents) == is_faulty
    assert watch.history[12].scalars["recompute_noise"] > 0


class Taken(nn.Module):
    """Its layers are called one by one, and the whole never is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)


def test_what_can_not_be_run_again_is_said_once() -> None:
    model = Taken()

    def run() -> Watch:
        with watched(model, on_error="warn") as watch:
            train(watch, model.linear, 6)
        return watch

    with pytest.warns(GradwatchWarning, match="twice is not seen") as told:
        watch = run()
    assert len(told) == 1
    assert any("twice is not seen" in note for note in watch.session.notes)


def test_nothing_is_kept_of_a_step_that_is_not_measured() -> None:
    model = network()
    with watched(model, every=3) as watch:
        train(watch, model, 3)  # at steps 1 and 2 it is due
        again = watch.session.engine.recomputation
        assert not again.is_listening
        assert again._handles == []


def test_optimizers_that_step_one_by_one_are_no_fault() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 3))
    optimizers = [torch.optim.SGD(layer.parameters(), 0.01) for layer in model]
    with Watch(model, optimizers, **OPTIONS) as watch:
        for step in range(14):
            for optimizer in optimizers:
                x, y = batch(step)
                model.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                watch.step(loss, optimizer=optimizer)
    assert not watch.incidents
    assert not watch.session.engine.guard.limits


def test_what_is_no_number_of_steps_is_refused() -> None:
    with pytest.raises(ConfigError) as info:
        watched(network(), recompute_every=0)
    assert str(info.value) == (
        "`recompute_every` must be a number of optimizer steps, 1 or more or None (never). Got 0."
    )
