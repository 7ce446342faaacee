"""The device that the other tests here run on does what a real one does, as far as they rely on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradwatch.torchside import _devices

from .device import Event, there
from .process import on_late


@pytest.mark.parametrize("lag", [0, 1, 2, 5])
@on_late
def test_numbers_and_events_arrive_lag_ticks_after_they_were_asked_for(lag: int) -> None:
    device = there()
    device.set_lag(lag)
    host = torch.empty(4, pin_memory=True)
    host.copy_(torch.arange(4.0, device="late"), non_blocking=True)
    event = Event()
    event.record()
    seen = []
    for _ in range(7):
        seen.append((event.query(), host[1].item() == 1))
        device.tick()
    assert seen == [(t >= lag, t >= lag) for t in range(7)]


@on_late
def test_waiting_for_an_event_brings_what_was_asked_for_before_it_and_nothing_later() -> None:
    device = there()
    device.set_lag(5)
    first, second = (torch.empty(1, pin_memory=True) for _ in range(2))
    first.copy_(torch.ones(1, device="late"), non_blocking=True)
    event = Event()
    event.record()
    second.copy_(torch.ones(1, device="late"), non_blocking=True)
    event.synchronize()
    assert first.item() == 1
    assert torch.isnan(second).item()


READS = {
    "host read": lambda t: _of_ours("t.sum().item()", t),
    "copy to pageable memory": lambda t: _of_ours("t.cpu()", t),
    "copy from pageable memory": lambda t: _of_ours("torch.ones(3).to('late')", t),
    "indexing by a mask": lambda t: _of_ours("t[t > 0]", t),
    "indexing by positions on the host": lambda t: _of_ours("t[torch.tensor([0, 1])]", t),
    "aten::nonzero": lambda t: _of_ours("torch.nonzero(t)", t),
}


def _of_ours(code: str, t: torch.Tensor) -> None:
    # The device tells gradwatch's code from a user's by the file that the frames belong to.
    exec(compile(code, _devices.__file__, "exec"), {"t": t, "torch": torch})


@pytest.mark.parametrize("what", READS)
@on_late
def test_what_makes_the_host_wait_is_counted_with_its_stack_and_refused_when_asked(what: str) -> None:
    device = there()
    t = torch.ones(3, device="late")
    with device.counting() as counts:
        READS[what](t)
    assert counts[what] == 1
    assert "_devices.py" in device.stacks[0][1]
    with device.refusing(), pytest.raises(RuntimeError, match="refuses"):
        READS[what](t)


@on_late
def test_a_users_own_reads_are_let_through() -> None:
    device = there()
    with device.refusing() as counts:
        assert torch.ones(3, device="late").sum().item() == 3
    assert not counts


@on_late
def test_a_kernel_is_not_given_tensors_of_two_devices() -> None:
    there()
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="late:0") + torch.ones(3, device="late:1")


@on_late
def test_float64_is_refused_like_on_mps() -> None:
    device = there()
    with device.without_float64():
        with pytest.raises(TypeError):
            torch.ones(3, dtype=torch.float64, device="late")
        assert _devices.wide_dtype(torch.device("late:0")) is torch.float32
    assert _devices.wide_dtype(torch.device("late:0")) is torch.float64


@on_late
def test_a_model_trains_there_as_on_the_cpu_bit_for_bit() -> None:
    device = there()
    weights = []
    for device in ("cpu", "late"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        x = torch.randn(16, 4)
        model, x = model.to(device), x.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        weights.append([p.detach().cpu() for p in model.parameters()])
    assert all(map(torch.equal, *weights))


@on_late
def test_memory_and_launches_are_counted() -> None:
    device = there()
    device.reset()
    held = device.memory
    t = torch.empty(1 << 20, device="late")
    assert device.memory - held == pytest.approx(4 << 20, rel=0.01)
    before = device.launches
    t.zero_()
    assert device.launches == before + 1
    del t
    assert device.memory == held
    assert device.peak - held == pytest.approx(4 << 20, rel=0.01)
