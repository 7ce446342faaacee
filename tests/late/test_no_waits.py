"""Nothing that gradwatch does in a step makes the host wait for the device."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch.rules import NonFinite
from gradwatch.stats import Statistic
from gradwatch.treatments import SkipStep
from gradwatch.watch._transfer import Transfer

from .device import Late, there
from .loops import Loop, fused, momentum, quiet
from .places import Place
from .process import on_late
from .scenarios.treatments import TREATMENTS

ALL = dict.fromkeys(("activations_every", "updates_every", "histograms_every"), 1)
OFTEN = {"activations_every": 3, "updates_every": 3, "histograms_every": 3}


class Mixed(nn.Module):
    """Norms, an embedding, weights in half precision, a parameter never used."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 6)
        self.norm = nn.BatchNorm1d(6)
        self.low = nn.Linear(6, 8).to(torch.bfloat16)
        self.out = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.words(x.abs().mul(3).long().clamp(max=9)).mean(1)
        return self.out(self.low(self.norm(x).to(torch.bfloat16)).relu().float())


def waits(device: Late, steps: int = 14, **options: Any) -> dict[str, int]:
    """Return what made the host wait in the steps of a run; its closing may wait."""
    device.set_lag(2)
    place = Place(2, torch.device("late:0"), is_real=True)
    with quiet(), device.counting() as counts:
        loop = Loop(place, **options)
        loop.steps(steps)
        found, stacks = dict(counts), list(device.stacks)
        loop.watch.close()
    assert not loop.watch.session.engine.guard.failed, loop.watch.session.engine.guard.failed
    if found:
        print("\n".join(f"{what}: {stack}" for what, stack in stacks[:5]))
    return found


@pytest.mark.parametrize("options", [OFTEN, ALL, ALL | {"every": 3}], ids=["often", "every-step", "every-third"])
@pytest.mark.parametrize("model", ["plain", "mixed"])
@on_late
def test_measuring_never_waits(options: dict[str, Any], model: str) -> None:
    kinds: dict[str, Any] = {"optimizer": lambda params: torch.optim.SGD(params, lr=1e-3)}
    if model == "mixed":
        kinds["model"] = Mixed
    assert waits(there(), rules="default", **kinds, **options) == {}


@pytest.mark.parametrize("name", [n for n in TREATMENTS if "signals" in n])
@on_late
def test_a_treatment_inside_backward_never_waits(name: str) -> None:
    assert waits(there(), optimizer=momentum, treatments=[TREATMENTS[name]()]) == {}


@pytest.mark.parametrize("model", ["plain", "mixed"])
@pytest.mark.parametrize("name", [n for n in TREATMENTS if "signals" not in n])
@on_late
def test_a_treatment_never_waits_whatever_the_gradients_are(name: str, model: str) -> None:
    if model == "mixed":
        options: dict[str, Any] = {"model": Mixed}
        assert waits(there(), steps=6, treatments=[TREATMENTS[name]()], **options) == {}
    else:
        device = there()
        device.set_lag(2)
        place = Place(2, torch.device("late:0"), is_real=True)
        with quiet(), device.counting() as counts:
            loop = Loop(place, treatments=[TREATMENTS[name]()])
            for factor in (1.0, 1e4, float("inf"), float("nan"), 1.0):
                loop.once(factor)
            found = dict(counts)
            loop.watch.close()
        assert found == {}


@on_late
def test_a_skip_that_the_optimizer_asks_the_device_for_never_waits() -> None:
    assert waits(there(), optimizer=fused, treatments=[SkipStep()]) == {}


@on_late
def test_autoclip_never_waits() -> None:
    assert waits(there(), optimizer=fused, rules="autoclip") == {}


@on_late
def test_skipping_what_is_not_finite_never_waits() -> None:
    assert waits(there(), optimizer=fused, rules=[NonFinite(then=SkipStep())]) == {}


@on_late
def test_a_losss_value_from_the_host_is_sent_without_a_wait() -> None:
    device = there()
    device.set_lag(2)
    place = Place(2, torch.device("late:0"), is_real=True)
    with quiet(), device.counting() as counts:
        loop = Loop(place)
        for _ in range(5):
            loop.optimizer.zero_grad()
            loop.loss(loop.model, loop.x, loop.y).backward()
            loop.watch.step(loss=torch.tensor(0.5))
            loop.passed()
        found = dict(counts)
        loop.watch.close()
    assert found == {}
    assert loop.watch.history[3].loss == 0.5


class Deep(nn.Module):
    """Many small layers: 300 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(150)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x) * 0.01
        return x


def launches(at: int, **options: Any) -> int:
    """Return the kernels and copies that watching adds to one step of a model of 300 parameters.

    Its backward's too, but for a dozen that each module's own output costs where these are sampled.
    """
    samples = options.get("activations_every") == 1
    device = there()
    device.set_lag(2)

    def one_step(watched: bool) -> int:
        loop = Loop(Place(2, torch.device("late:0"), is_real=True), model=Deep, optimizer=fused, **options)
        with quiet(), loop.watch:
            loop.steps(at)
            loop.optimizer.zero_grad()
            loss = loop.loss(loop.model, loop.x, loop.y)
            if not watched:
                loop.watch.close()
            device.reset()
            loss.backward()
            if samples:
                device.reset()
            if watched:
                loop.watch.after_backward(loss)
            loop.optimizer.step()
            if watched:
                loop.watch.after_step()
            return device.launches

    return one_step(True) - one_step(False)


NOTHING: dict[str, Any] = {"activations_every": None, "updates_every": None, "histograms_every": None}
OFTEN_UPDATES, OFTEN_HISTOGRAMS = NOTHING | {"updates_every": 3}, NOTHING | {"histograms_every": 3}


@pytest.mark.parametrize(
    ("at", "most", "options"),
    [
        # Norms in one multi-tensor kernel when backward is over, a row of all that the host wants, its copy.
        pytest.param(3, 3, {"rules": "default"}, id="defaults"),
        # Besides: one pass over the packed gradients and a copy of the weights, looked at before and after. The norms
        # of the backward are one kernel more.
        pytest.param(5, 19, {"rules": "default", **ALL}, id="everything"),
        pytest.param(6, 13, {"rules": "default", **OFTEN_HISTOGRAMS}, id="histograms"),
        # At the first step rows of weights are compared; where the bins of each gradient lie is sent to stay.
        pytest.param(0, 36, {"rules": "default", **OFTEN_HISTOGRAMS}, id="histograms-at-first"),
        pytest.param(6, 10, {"rules": "default", **OFTEN_UPDATES}, id="updates"),
        pytest.param(5, 26, {"rules": "autoclip", **OFTEN_UPDATES}, id="treatments"),
        pytest.param(6, 33, {"rules": "autoclip", **OFTEN_UPDATES}, id="treatments-and-updates"),
    ],
)
@on_late
def test_a_step_costs_so_many_kernels_however_many_parameters_there_are(
    at: int, most: int, options: dict[str, Any]
) -> None:
    found = launches(at, **options)
    assert found <= most, found


@on_late
def test_numbers_of_several_kinds_travel_in_their_own_bits() -> None:
    device = there()
    device.set_lag(2)
    at = torch.device("late:0")
    several = [torch.tensor(x, dtype=torch.float64, device=at) for x in (0.1, float("nan"), float("inf"))]
    parts = {
        "loss": torch.tensor(0.1, device=at),
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16, device=at),
        "narrow": torch.tensor([1.5], dtype=torch.bfloat16, device=at),
        "is_bad": torch.tensor([True, False], device=at),
        "counts": torch.tensor([[2**60 + 1, 3]], device=at),
        "several": several,
        "known": 3.0,
    }
    with device.counting() as counts:
        transfer = Transfer(parts, then=lambda found: found.update(follows=found["known"] + 1))
        assert not transfer.ready
        assert counts == {}
    device.tick()
    device.tick()
    assert transfer.ready
    found = transfer.result()
    assert (found["loss"].dtype, float(found["loss"])) == (np.float64, float(np.float32(0.1)))
    assert found["half"].tolist() == [1.5, -2.0]
    assert found["narrow"].tolist() == [1.5]
    assert found["is_bad"].tolist() == [1.0, 0.0]
    assert found["counts"].tolist() == [[2**60 + 1, 3]]
    assert np.array_equal(found["several"], [0.1, np.nan, np.inf], equal_nan=True)
    assert (found["known"], found["follows"]) == (3.0, 4.0)


class _Moving(Statistic):
    """Cosine with the gradient of the step before, and the largest entry."""

    name, num_sums, num_maxima = "moving", 3, 1

    def sums(self, view):
        last, now = view.memory.get("last"), [grad.float() for grad in view.grads]
        view.memory["last"] = [grad.clone() for grad in now]
        if last is None:
            return None
        pairs = list(zip(last, now, strict=True))
        return view.rows([(a * b).sum() for a, b in pairs], *([x[i].square().sum() for x in pairs] for i in (0, 1)))

    def maxima(self, view):
        return view.rows([grad.abs().max() for grad in view.grads])


class _Given(Statistic):
    """Sum of each output."""

    name, needs = "given", frozenset({"outputs"})

    def sums(self, view):
        return view.rows([sum(t.float().sum() for t in view.outputs)])


@on_late
def test_a_statistic_of_ones_own_never_waits() -> None:
    assert waits(there(), rules="default", optimizer=momentum, statistics=[_Moving(), _Given()]) == {}


@on_late
def test_what_speaks_before_the_loss_does_never_waits() -> None:
    more = ["weight_spectra", "effective_rank"]
    assert waits(there(), rules=["default", "ahead"], optimizer=momentum, statistics=more) == {}


@pytest.mark.parametrize("rules", [True, False])
@on_late
def test_a_step_that_the_device_vetoes_is_proven_without_a_wait(rules: bool) -> None:
    device = there()
    device.set_lag(2)
    skips: dict[str, Any] = {"rules": [NonFinite(then=SkipStep())]} if rules else {"treatments": [SkipStep()]}
    with quiet(), device.counting() as counts:
        loop = Loop(Place(2, torch.device("late:0"), is_real=True), optimizer=fused, **skips)
        for step in range(12):
            loop.once(float("nan") if step in (0, 5) else 1.0)
        found = dict(counts)
        loop.watch.close()
    assert found == {}
    assert [r.step for r in loop.watch.history if r.skipped] == [0, 5]
    assert not [i for i in loop.watch.incidents if i.rule.startswith("veto")]


@contextmanager
def careless_kernel() -> Iterator[None]:
    """Let the device's fused kernel move weights and moments though it was told not to, as some devices' do."""
    library = torch.library.Library("aten", "IMPL")

    def careless(params: Any, grads: Any, firsts: Any, *rest: Any, **named: Any) -> None:
        for p, first in zip(params, firsts, strict=True):
            p.mul_(0.999)
            first.add_(1.0)

    library.impl("_fused_adamw_", careless, "PrivateUse1")
    try:
        yield
    finally:
        library._destroy()


@pytest.mark.parametrize("stops", [False, True])
@on_late
def test_a_kernel_that_moves_at_a_step_that_the_device_vetoed_is_told_and_asked_no_more(stops: bool) -> None:
    device = there()
    device.set_lag(2)
    with quiet(), careless_kernel():
        loop = Loop(
            Place(2, torch.device("late:0"), is_real=True),
            optimizer=fused,
            treatments=[SkipStep()],
            stop_on_unproven=stops,
        )
        loop.run(20, lambda step: float("nan") if step in (5, 12) else 1.0)
    told = {i.rule: i for i in loop.watch.incidents if i.rule.startswith("veto")}
    unproven = told.pop("veto_unproven")
    assert (unproven.first_step, unproven.severity, unproven.count) == (5, "critical", 1)
    assert "asked on the device" in unproven.message
    if stops:
        assert loop.end.startswith("TrainingStopped")
        assert loop.step <= 10
    else:
        # The second time the step waits for the verdict, and is put back from copies.
        assert loop.end == ""
        assert told["veto_undone"].first_step == 12


@on_late
def test_a_case_file_with_its_samples_and_its_batch_waits_for_nothing() -> None:
    device = there()
    device.set_lag(2)
    place = Place(2, torch.device("late:0"), is_real=True)
    with tempfile.TemporaryDirectory() as folder, quiet(), device.counting() as counts:
        loop = Loop(place, rules=[NonFinite()], save_batch=True, run_dir=folder, autopsy=False)
        ids = torch.arange(100, 116).to(place.device)
        for step in range(40):
            loop.optimizer.zero_grad()
            loss = loop.loss(loop.model, loop.x, loop.y) * (float("nan") if step == 12 else 1.0)
            loss.backward()
            loop.watch.step(loss=loss, batch={"x": loop.x, "idx": ids})
            loop.passed()
        found, stacks = dict(counts), list(device.stacks)
        loop.watch.close()
        saved = len(list(Path(folder).glob("batch-*.safetensors")))
    assert found == {}, stacks[:3]
    case = loop.watch.incidents[0].case
    assert case is not None
    assert (case.step, case.sample_ids) == (12, tuple(range(100, 116)))
    assert saved == 1
