"""Models that lie on several devices, on one without float64, partly on the host: the same numbers as on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import gradwatch.stats as stats
from gradwatch import Watch
from gradwatch.rules import NonFinite
from gradwatch.stats._scaling import scale_, times_
from gradwatch.torchside import _devices
from gradwatch.treatments import SkipStep

from .device import there
from .loops import quiet
from .process import on_late
from .scenarios.treatments import TREATMENTS

Places = Callable[[int], str]
PLACES: dict[str, Places] = {
    "one": lambda i: "late:0",
    "two": lambda i: f"late:{i % 2}",
    "the second": lambda i: "late:1",
    "with the host": lambda i: ("cpu", "late:1", "late:0")[i % 3],
}
SCALES = {"tiny": 1e-30, "usual": 1.0, "huge": 1e30}


def tensors(scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5,), (3, 4), (1,), (0,), (7, 2, 3), (9000,), (4, 4)]
    found = [torch.randn(shape, generator=generator) * scale for shape in shapes]
    found[3 - 1].zero_()
    if 1e-4 < scale < 1e4:
        found[1], found[4] = found[1].half(), found[4].bfloat16()
    return found


def put(found: Sequence[Tensor], place: Places) -> list[Tensor]:
    return [t.to(place(i)) for i, t in enumerate(found)]


KERNELS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "norms": stats.tensor_norms,
    "global norm": lambda t: stats.global_norm(stats.tensor_norms(t)),
    "second look": stats.second_look,
    "zeros": lambda t: stats.gradient_details(t).sums,
    "largest": lambda t: stats.gradient_details(t).maxima,
    "histograms": stats.exponent_histograms,
    "all norms": lambda t: stats.measure_gradients(t, histograms=True).norms,
    "all histograms": lambda t: stats.measure_gradients(t, histograms=True).histograms,
    "spread": lambda t: stats.row_spread([x for x in t if x.ndim == 2]),
}


@pytest.mark.parametrize("double", [True, False], ids=["float64", "no-float64"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("place", PLACES)
@on_late
def test_numbers_are_the_cpus(place: str, scale: str, double: bool) -> None:
    device = there()
    with nullcontext() if double else device.without_float64():
        for name, kernel in KERNELS.items():
            expected = kernel(tensors(SCALES[scale])).double()
            found = kernel(put(tensors(SCALES[scale]), PLACES[place]))
            assert found.device.type == "late", name
            torch.testing.assert_close(
                found.cpu().double(), expected, rtol=2e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("place", PLACES)
@on_late
def test_gramians_are_the_cpus(place: str) -> None:
    there()
    tasks = [tensors(1.0), [t * 2 + 1 for t in tensors(1.0)]]
    expected = stats.gramian(tasks)
    found = stats.gramian([put(task, PLACES[place]) for task in tasks])
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=0)


def layers(place: Places) -> tuple[list[nn.Linear], Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    found = [nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)]
    for i, layer in enumerate(found):
        layer.to(place(i))

    def forward(x: Tensor) -> Tensor:
        for layer in found:
            x = layer(x.to(layer.weight.device)).tanh()
        return x

    return found, forward


UNLIKE = ("spike_clip", "noise")
"""One needs another optimizer; the other draws on each device for itself."""


OFTEN = (None, "clip_by_global_norm", "clip_by_norm", "ema_clip", "clip_error_signals", "skip_step")
SELDOM = tuple(n for n in TREATMENTS if n not in UNLIKE + OFTEN)


def trained(place: Places, treatments: Sequence[object], steps: int = 10) -> tuple[Watch, list[Tensor]]:
    found, forward = layers(place)
    model = nn.ModuleList(found)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    options = dict.fromkeys(("activations_every", "updates_every", "histograms_every"), 3)
    with quiet(), Watch(model, optimizer, rules=[NonFinite()], treatments=treatments, **options) as watch:
        for i in range(steps):
            optimizer.zero_grad()
            loss = forward(x).square().mean() * (100.0 if i == 6 else float("nan") if i == 8 else 1.0)
            loss.backward()
            watch.step(loss=loss)
    return watch, [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize(
    ("place", "double"), [("two", True), ("with the host", False)], ids=["two", "with-the-host-and-no-float64"]
)
@pytest.mark.parametrize("name", [*OFTEN, *(pytest.param(n, marks=pytest.mark.slow) for n in SELDOM)])
@on_late
def test_a_model_over_several_devices_is_treated_as_on_the_cpu(name: str | None, place: str, double: bool) -> None:
    device = there()

    def treatments() -> list[object]:
        return [SkipStep()] if name == "skip_step" else [] if name is None else [TREATMENTS[name]()]

    expected, weights = trained(lambda i: "cpu", treatments())
    with nullcontext() if double else device.without_float64():
        watch, found = trained(PLACES[place], treatments())
    assert not watch.session.engine.guard.failed
    assert [(i.rule, i.first_step) for i in watch.incidents] == [(i.rule, i.first_step) for i in expected.incidents]
    for one, other in zip(expected.history, watch.history, strict=True):
        assert one.global_norm == pytest.approx(other.global_norm, rel=1e-3, nan_ok=True)
        assert one.global_norm_after == pytest.approx(other.global_norm_after, rel=1e-3, nan_ok=True)
        assert set(one.columns) == set(other.columns)
    for a, b in zip(weights, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("coefficient", [1e-6, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64], ids=str)
@on_late
def test_a_small_coefficient_is_not_rounded_to_the_gradients_dtype(dtype: torch.dtype, coefficient: float) -> None:
    there()
    for shape in ((), (4,)):
        whole, each = (torch.full(shape, 60000.0, dtype=dtype, device="late") for _ in range(2))
        scale_([whole], torch.tensor(coefficient, dtype=torch.float64).to("late"))
        scale_([each], torch.tensor([coefficient], dtype=torch.float64).to("late"))
        expected = torch.full(shape, 60000.0 * coefficient, dtype=dtype)
        torch.testing.assert_close(whole.cpu(), expected, rtol=2e-2, atol=0)
        torch.testing.assert_close(each.cpu(), whole.cpu(), rtol=0, atol=0)


def test_times_promotes_on_devices_that_round_the_factor_first() -> None:
    # A device's kernel takes a 0-dim factor in the tensor's dtype; with a dimension it is what torch promotes to.
    values = torch.full((3, 2), 60000.0, dtype=torch.float16)
    times_(values, torch.tensor(1e-8))
    torch.testing.assert_close(values, torch.full((3, 2), 6e-4, dtype=torch.float16), rtol=1e-3, atol=0)


@on_late
def test_a_device_without_events_or_pinned_memory_is_waited_for() -> None:
    device = there()
    module = torch.get_device_module("late")
    expected, weights = trained(PLACES["one"], [SkipStep()])
    for lacking in ("Event", "pinned memory"):
        event, pins = module.Event, _devices._pins
        _devices._event_class.cache_clear()
        try:
            if lacking == "Event":
                del module.Event
            else:
                _devices._pins = lambda kind: False
            device.set_lag(5)
            watch, found = trained(PLACES["one"], [SkipStep()])
        finally:
            module.Event, _devices._pins = event, pins
            _devices._event_class.cache_clear()
        assert not watch.session.engine.guard.failed
        assert [r.global_norm for r in watch.history] == pytest.approx(
            [r.global_norm for r in expected.history], nan_ok=True
        )
        assert all(map(torch.equal, weights, found)), lacking


@on_late
def test_random_states_of_all_devices_are_kept() -> None:
    there()
    state = _devices.random_state()
    assert len(state["late"]) == 2
    drawn = torch.rand(3)
    _devices.set_random_state(state)
    assert torch.equal(torch.rand(3), drawn)
