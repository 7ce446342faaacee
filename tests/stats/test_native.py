"""The compiled kernels measure what torch does, and do without a compiler what they can: nothing."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from gradwatch.stats import UpdateMeter, exponent_histograms, gradient_details, moments, tensor_norms
from gradwatch.stats import _native as module

SIZES = [0, 1, 15, 16, 17, 4095, 4096, 4097, 100_003]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture
def kernels() -> module.Native:
    loaded = module._load()
    if loaded is None:
        pytest.skip("no C compiler here")
    return loaded


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_load", lambda: None)


def samples(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator).relu().sub(0.1).to(dtype) for n in SIZES]
    awkward = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-30, -1e30, 1e-42, 3.0] * 13, dtype=dtype)
    return [*tensors, awkward, awkward[awkward.isfinite()]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_agree_with_torch_in_float64(kernels: module.Native, dtype: torch.dtype) -> None:
    found = kernels.moments(samples(dtype))
    for x, (total, sumsq, zeros, nonfinite, absmax) in zip(samples(dtype), found, strict=True):
        wide = x.double()
        np.testing.assert_allclose([total, sumsq], [wide.sum(), wide.square().sum()], rtol=1e-12, atol=1e-9)
        assert (zeros, nonfinite) == ((x == 0).sum(), (~x.isfinite()).sum())
        magnitudes = wide[~wide.isnan()].abs()
        assert absmax == (magnitudes.max().item() if len(magnitudes) else 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_histograms_and_squares_agree_with_torch(kernels: module.Native, dtype: torch.dtype, without_native) -> None:
    xs = samples(dtype)
    assert torch.equal(torch.from_numpy(kernels.histograms(xs)), exponent_histograms(xs))
    moments_found, counts = kernels.everything(xs)
    np.testing.assert_array_equal(moments_found, kernels.moments(xs))
    assert torch.equal(torch.from_numpy(counts), exponent_histograms(xs))
    expected = torch.stack([x.double().square().sum() for x in xs])
    torch.testing.assert_close(torch.from_numpy(kernels.squares(xs)), expected, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moves_agree_with_torch(kernels: module.Native, dtype: torch.dtype) -> None:
    before = [x for x in samples(dtype) if x.isfinite().all()]
    after = [(x * 1.5 + 0.25).to(dtype) for x in before]
    found = kernels.moved(before, after)
    expected = [
        [(a.double() - b.double()).square().sum(), b.double().square().sum()]
        for a, b in zip(after, before, strict=True)
    ]
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_public_statistics_are_the_same_with_and_without(dtype: torch.dtype, kernels, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, generator=generator).to(dtype) for n in (300_000, 17, 70_000)]

    def measure():
        meter = UpdateMeter(grads, 1 << 24)
        meter.before()
        for g in grads:
            g.mul_(0.5)
        moved = meter.after()
        for g in grads:
            g.mul_(2.0)
        details = gradient_details(grads)
        single = torch.stack([moments(g) for g in grads])
        return [tensor_norms(grads), moved.update_norms, moved.param_norms, details.sums, details.maxima, single]

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    native = measure()
    monkeypatch.setattr(module, "_load", lambda: None)
    for a, b in zip(native, measure(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-2)


def test_small_models_never_start_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_load", lambda: pytest.fail("asked for"))
    grads = [torch.ones(1000) for _ in range(4)]
    tensor_norms(grads)
    gradient_details(grads)
    exponent_histograms(grads)
    moments(grads[0])


def test_negated_views_and_subclasses_are_left_to_torch() -> None:
    negated = torch.randn(300_000, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    assert module.native([negated], worth=0) is None
    torch.testing.assert_close(tensor_norms([negated])[0], negated.double().norm(), rtol=1e-6, atol=0)


def answer(code: str, **env: str) -> str:
    full = {**os.environ, **env}
    ran = subprocess.run([sys.executable, "-c", code], env=full, capture_output=True, text=True, check=True)
    return ran.stdout.strip()


@pytest.mark.slow
def test_switched_off_uncompilable_and_without_compiler_there_are_no_kernels(tmp_path) -> None:
    code = "from gradwatch.stats._native import _load; print(_load() is not None)"
    assert answer(code, GRADWATCH_NATIVE="0") == "False"
    assert answer(code, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path)) == "False"
    (tmp_path / "cc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    assert answer(code, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path)) == "False"


@pytest.mark.slow
def test_library_is_compiled_once_and_found_again(tmp_path, kernels) -> None:
    code = "from gradwatch.stats._native import _load; print(_load() is not None)"
    for _ in range(2):
        assert answer(code, XDG_CACHE_HOME=str(tmp_path)) == "True"
    assert len(list((tmp_path / "gradwatch").glob("native-*.so"))) == 1
    assert len(list((tmp_path / "gradwatch").iterdir())) == 1
