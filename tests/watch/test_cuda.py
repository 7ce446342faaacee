"""On CUDA nothing waits for the device at defaults, numbers are the same, and vetoes come in time."""

import math

import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.watch import ScaleReader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def problem(device: str = "cuda"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.ReLU(inplace=True), nn.Linear(64, 4)).to(device)
    x = torch.randn(512, 32, device=device)
    return model, x, torch.randint(0, 4, (512,), device=device)


def fit(device="cuda", steps=70, rules="default", spike=None, nan=None, make=torch.optim.AdamW, mode=None, **options):
    model, x, y = problem(device)
    optimizer = make(model.parameters(), lr=1e-3)
    vetoed = []
    with Watch(model, optimizer, rules=rules, on_error="raise", **options) as watch:
        for i in range(steps):
            optimizer.zero_grad()
            out = model(x)
            loss = nn.functional.cross_entropy(out, y)
            if i == spike:
                loss = loss * 1000
            if i == nan:
                loss = loss * math.nan
            if mode is not None and i == 2:
                torch.cuda.set_sync_debug_mode(mode)
            try:
                loss.backward()
                vetoed.append(watch.step(loss=loss, batch=x, outputs=out, targets=y).skip)
            finally:
                if i == steps - 1:
                    torch.cuda.set_sync_debug_mode("default")
    return watch, model, vetoed


def test_no_step_at_defaults_waits_for_the_device() -> None:
    watch, _, _ = fit(steps=120, mode="error")
    assert len(watch.history) == 120


def test_everything_at_every_step_waits_for_nothing_either() -> None:
    watch, _, _ = fit(steps=20, mode="error", activations_every=1, updates_every=1, histograms_every=1)
    assert "update_ratio" in watch.history[10].columns
    assert watch.history[10].histograms


def test_records_equal_those_of_the_cpu() -> None:
    (cuda, *_), (cpu, *_) = (fit(d, steps=12, activations_every=1, updates_every=1) for d in ("cuda", "cpu"))
    for a, b in zip(cuda.history, cpu.history, strict=True):
        assert a.global_norm == pytest.approx(b.global_norm, rel=1e-3)
        for name in ("grad_norm", "update_ratio", "output_rms"):
            for path, x, y in zip(a.index.paths, a.columns[name], b.columns[name], strict=True):
                assert x == pytest.approx(y, rel=2e-2, nan_ok=True), (name, path)


def test_a_spike_is_clipped_in_its_own_step_without_waiting() -> None:
    watch, _, _ = fit(steps=220, rules="autoclip", spike=200)
    record = watch.history[200]
    assert record.global_norm > 100 * record.global_norm_after
    assert {i.rule for i in watch.incidents} >= {"exploding"}
    assert next(i for i in watch.incidents if i.rule == "exploding").treatments == ("clip_to_limit",)


@pytest.mark.parametrize("fused", [False, True])
def test_a_nan_step_is_skipped_bit_for_bit(fused: bool) -> None:
    def make(params, lr):
        return torch.optim.AdamW(params, lr=lr, fused=fused)

    watch, model, _ = fit(steps=30, rules="autoclip", nan=20, make=make)
    assert [r.step for r in watch.history if r.skipped] == [20]
    twin, x, y = problem()
    optimizer = make(twin.parameters(), 1e-3)
    for i in range(30):
        if i == 20:
            continue
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_loss_scale_is_read_without_waiting_and_as_it_is_now() -> None:
    scaler, reader = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=1), ScaleReader()
    model, x, _ = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(4):
        reader.begin(scaler)
        loss = scaler.scale(model(x).square().mean())
        torch.cuda.set_sync_debug_mode("error")
        try:
            scale = reader.read(scaler)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert scale == scaler.get_scale()
        loss.backward()
        scaler.step(optimizer)
        scaler.update()
        assert reader.read(scaler) == scaler.get_scale() == 2 * scale
