"""On a CUDA device: the same numbers as on the host, and no waiting for the device."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from gradwatch.hooks import ModuleTap
from gradwatch.stats import (
    Gradients,
    UpdateMeter,
    exponent_histograms,
    global_norm,
    gradient_details,
    gramian,
    kernel_backends,
    measure_gradients,
    moments,
    second_look,
    tensor_norms,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = [1, 0, 17, 1024, 16_384, 16_385, 1_000_003]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def samples(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator).relu().sub(0.1).to(dtype) for n in SIZES]
    tensors.append(torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-30, -3.0] * 5, dtype=dtype))
    tensors.append(torch.randn(64, 48, generator=generator).to(dtype).T)
    return tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_measured_on_the_device_equals_the_host(dtype: torch.dtype) -> None:
    host = samples(dtype)
    device = [t.cuda() for t in host]
    expected, found = measure_gradients(host, histograms=True), measure_gradients(device, histograms=True)
    for name in ("norms", "sums", "maxima", "histograms"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.is_cuda
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=0, equal_nan=True, msg=name)
    torch.testing.assert_close(tensor_norms(device).cpu(), expected.norms, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(second_look(device).cpu(), expected.norms, rtol=1e-6, atol=0, equal_nan=True)
    assert torch.equal(exponent_histograms(device).cpu(), expected.histograms)
    assert torch.equal(gradient_details(device).sums.cpu(), expected.sums)
    for a, b in zip(device, host, strict=True):
        torch.testing.assert_close(
            moments(a.reshape(-1)).cpu(), moments(b.reshape(-1)), rtol=1e-5, atol=1e-2, equal_nan=True
        )


def test_mixed_dtypes_are_measured_together() -> None:
    host = [t for dtype in DTYPES for t in samples(dtype)]
    found = measure_gradients([t.cuda() for t in host], histograms=True)
    expected = measure_gradients(host, histograms=True)
    torch.testing.assert_close(found.norms.cpu(), expected.norms, rtol=1e-6, atol=0, equal_nan=True)
    assert torch.equal(found.histograms.cpu(), expected.histograms)


@pytest.mark.parametrize("exponent", range(-36, 37, 12))
def test_norms_keep_their_digits_at_every_scale(exponent: int) -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 10.0**exponent
    expected = x.double().norm()
    for found in (tensor_norms([x.cuda()])[0], measure_gradients([x.cuda()]).norms[0]):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=0)


def test_same_gradients_give_the_same_bits_again() -> None:
    tensors = [torch.randn(1_000_003, device="cuda") for _ in range(3)]
    first, second = measure_gradients(tensors, histograms=True), measure_gradients(tensors, histograms=True)
    assert torch.equal(first.norms, second.norms)
    assert torch.equal(first.histograms, second.histograms)


def test_one_read_kernels_are_used_where_triton_is() -> None:
    pytest.importorskip("triton")
    measure_gradients([torch.ones(5, device="cuda")])
    assert kernel_backends()["cuda"] == "triton"


def test_nothing_waits_for_the_device() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid()).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tap = ModuleTap(model, ["0", "1", "2", "3"])
    meter = UpdateMeter(list(model.parameters()), 1 << 24)
    x = torch.randn(512, 64, device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        tap.arm()
        model(x).sum().backward()
        tap.disarm()
        tap.take()
        grads = Gradients.collect(list(model.named_parameters()), grad_scale=torch.ones((), device="cuda"))
        limit = torch.ones((), device="cuda")
        grads.mul_((limit / grads.global_norm).clamp(max=1.0))
        grads.mul_(torch.where(grads.norms > 0.5, 0.5, 1.0))
        grads.select("0.*").mul_(0.5)
        grads.measure(histograms=True)
        global_norm(tensor_norms(grads.grads))
        gramian([grads.grads, grads.grads])
        meter.before()
        optimizer.step()
        meter.after()

    step()
    step()
    with no_waiting():
        step()


def test_taps_measure_the_same_on_both_devices() -> None:
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8), nn.Tanh())
        x = torch.randn(300, 32)
        model, x = model.to(device), x.to(device)
        tap = ModuleTap(model, ["0", "1", "2", "3"])
        tap.arm()
        model(x).square().sum().backward()
        tap.disarm()
        stats = tap.take()
        assert tap.coverage() == {}
        results.append(stats.to_columns(stats.sums.cpu().numpy(), stats.maxima.cpu().numpy())[0])
    assert results[0].keys() == results[1].keys()
    for name, column in results[0].items():
        torch.testing.assert_close(
            torch.from_numpy(column), torch.from_numpy(results[1][name]), rtol=1e-3, atol=1e-4, equal_nan=True, msg=name
        )
