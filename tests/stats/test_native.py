"""The compiled kernels measure what torch does, and do without a compiler what they can: nothing."""

import ctypes
import math
import os
import subprocess
import sys
from array import array
from pathlib import Path

import numpy as np
import pytest
import torch

from gradwatch import Watch
from gradwatch.stats import (
    UpdateMeter,
    exponent_histograms,
    gradient_details,
    host_moments,
    kernel_faults,
    moments,
    moments_in_passing,
    tensor_norms,
)
from gradwatch.stats import _native as module
from gradwatch.torchside import lend_at_once

SIZES = [0, 1, 15, 16, 17, 4095, 4096, 4097, 100_003]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture
def kernels() -> module.Native:
    loaded = module._load()
    if loaded is None:
        why = module.native_state()
        assert "wrong numbers" not in why, why  # a skip would hide it
        pytest.skip(f"there are none here: {why}")
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
def test_moments_of_a_single_tensor_are_those_of_one_among_many(kernels: module.Native, dtype: torch.dtype) -> None:
    xs = samples(dtype)
    single = [kernels.moments_of(x) for x in xs]
    assert not kernels.fault
    np.testing.assert_array_equal(single, kernels.moments(xs))


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


LITTLE = """
import sys, os, torch
from pathlib import Path
from gradwatch.stats import exponent_histograms, gradient_details, moments, tensor_norms
grads = [torch.ones(1000) for _ in range(4)]
gradient_details(grads), exponent_histograms(grads), moments(grads[0])
for _ in range(int(sys.argv[1])):
    norms = tensor_norms(grads)
torch.testing.assert_close(norms, torch.full((4,), 1000.0).double().sqrt())
print(len(list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.so"))))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("measurements", "libraries"), [(100, 0), (200, 1)])
def test_a_small_model_starts_a_compiler_where_its_run_lasts(
    kernels: module.Native, measurements: int, libraries: int, tmp_path: Path
) -> None:
    command, env = [sys.executable, "-c", LITTLE, str(measurements)], {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, f"{libraries}\n"), ran.stderr


def test_a_little_work_has_the_kernels_where_they_lie_compiled(
    kernels: module.Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_little", module._Little())
    assert module.native_at_hand(1, worth=1 << 18) is kernels


def test_memory_that_was_given_back_or_cut_short_is_lent_to_nobody() -> None:
    whole, cut, gone, view = (torch.ones(10) for _ in range(4))
    assert lend_at_once([whole, view[2:]], dtype=torch.float32) is not None
    cut.untyped_storage().resize_(20)
    gone.untyped_storage().resize_(0)
    for bad in (cut, gone, view.double(), view[::2], torch.ones(2, device="meta"), torch.ones(2).to_sparse()):
        assert lend_at_once([whole, bad], dtype=torch.float32) is None


def test_what_fills_its_memory_is_lent_alike_with_its_size_known_and_nothing_else_is() -> None:
    base = torch.randn(4, 4)
    cut, gone = torch.ones(16), torch.ones(16)
    cut.untyped_storage().resize_(20)
    gone.untyped_storage().resize_(0)
    wide, row, overlapping = torch.ones(32)[16:], base[0].expand(4, 4), base.as_strided((4, 4), (1, 1))
    odd = [cut, gone, wide, row, overlapping, base.t(), base.double(), torch.ones(8), torch.ones(32)]
    odd += [torch.ones(16, device="meta"), torch.ones(16).to_sparse(), torch.zeros(0)]
    whole = torch.randn(16)
    for numels in ((16, 16), (16, 8), (16, 0), (16,)):
        for other in (base, *odd):
            known = lend_at_once([whole, other], dtype=torch.float32, numels=array("q", numels))
            assert known == lend_at_once([whole, other], dtype=torch.float32), (numels, other.shape)


def test_negated_views_and_subclasses_are_left_to_torch() -> None:
    negated = torch.randn(300_000, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    assert module.native([negated], worth=0) is None
    torch.testing.assert_close(tensor_norms([negated])[0], negated.double().norm(), rtol=1e-6, atol=0)


class Wrong:
    """A kernel that is right for some calls, and then doubles what it writes."""

    def __init__(self, kernel, right_calls: int) -> None:
        self.kernel, self.right_calls = kernel, right_calls

    def __call__(self, dtype, count, tensors, numels, out) -> None:
        self.kernel(dtype, count, tensors, numels, out)
        self.right_calls -= 1
        if self.right_calls < 0:
            ctypes.c_double.from_address(out).value *= 2


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, kernels: module.Native) -> module.Native:
    """Kernels of this test's own, in the place of the process's."""
    own = module.Native(module.library())
    monkeypatch.setattr(module, "_attempt", lambda: module._Attempt(own))
    monkeypatch.setattr(module, "_faults", [])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return own


@pytest.mark.parametrize("right_calls", [0, 3])
def test_a_kernel_that_disagrees_with_torch_is_switched_off_and_torch_answers(fresh, right_calls: int) -> None:
    fresh._functions["norms"] = Wrong(fresh._functions["norms"], right_calls)
    gradient = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    expected = gradient.double().norm().item()
    for _ in range(right_calls + 1):
        assert tensor_norms([gradient]).item() == pytest.approx(expected, rel=1e-6)
    assert module._load() is None
    told = "the compiled kernel 'norms' and torch measured different numbers: it is switched off"
    assert kernel_faults() == [told]
    assert module.native_state() == f"torch ({told})"
    assert tensor_norms([gradient]).item() == pytest.approx(expected, rel=1e-6)


def test_kernels_are_compared_at_calls_that_can_be_told_beforehand(fresh: module.Native) -> None:
    due = [call for call in range(1, 5000) if fresh._is_due("squares")]
    assert due == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3072, 4096]


def test_of_very_many_small_tensors_a_few_are_compared_each_time_and_all_in_turn(fresh: module.Native) -> None:
    pieces = [torch.ones(4) for _ in range(500)]
    seen, most = set(), 0
    for _ in range(600):
        fresh._calls["squares"] = fresh._calls.get("squares", 0) + 1
        chosen = fresh._sample(pieces)
        most = max(most, len(chosen))
        seen.update(chosen)
    assert most == 64
    assert seen == set(range(500))


def test_denormal_numbers_flushed_by_the_processor_are_no_disagreement(fresh: module.Native) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't")
    try:
        for dtype in DTYPES:
            tiny = (torch.arange(-5_000.0, 5_000.0, dtype=torch.float64) * torch.finfo(dtype).tiny / 1e4).to(dtype)
            fresh.moments([tiny])
            fresh.everything([tiny])
            fresh.moved([tiny], [tiny * 2])
            fresh.moments_of(tiny)
    finally:
        torch.set_flush_denormal(False)
    assert fresh.fault == ""


def test_moments_in_passing_are_the_moments(kernels: module.Native) -> None:
    for dtype in DTYPES:
        for tensor in samples(dtype):
            found = moments_in_passing(tensor)
            if found is not None:
                assert np.array_equal(found, host_moments(tensor), equal_nan=True)
    assert moments_in_passing(torch.randn(10_000)) is not None


def shrunk() -> torch.Tensor:
    tensor = torch.randn(10_000)
    tensor.untyped_storage().resize_(4)
    return tensor


NOT_IN_PASSING = {
    "not in a row": lambda: torch.randn(200, 100).t(),
    "half": lambda: torch.randn(10_000).half(),
    "integers": lambda: torch.ones(10_000, dtype=torch.int64),
    "complex": lambda: torch.randn(10_000, dtype=torch.complex64),
    "sign put off": lambda: torch.randn(10_000, dtype=torch.complex64).conj().imag.contiguous()._neg_view(),
    "zeros never made": lambda: torch._efficientzerotensor((10_000,)),
    "sparse": lambda: torch.eye(100).to_sparse(),
    "no memory": lambda: torch.empty(10_000, device="meta"),
    "memory given back": shrunk,
    "empty": lambda: torch.empty(0),
    "a class of its own": lambda: torch.randn(10_000).as_subclass(type("Own", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("make", NOT_IN_PASSING.values(), ids=NOT_IN_PASSING)
def test_what_takes_more_than_one_call_is_not_measured_in_passing(make, kernels: module.Native) -> None:
    assert moments_in_passing(make()) is None


def test_nothing_is_measured_in_passing_without_a_compiler(without_native: None) -> None:
    assert moments_in_passing(torch.randn(10_000)) is None


def test_a_watch_tells_of_a_kernel_that_was_switched_off(fresh: module.Native) -> None:
    fresh._functions["norms"] = Wrong(fresh._functions["norms"], 1)
    model = torch.nn.Linear(600, 600)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with Watch(model, optimizer, rules="observe", histograms_every=None, updates_every=None) as watch:
        for _ in range(3):
            loss = model(torch.randn(4, 600)).square().sum()
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            watch.step(loss=loss)
            assert watch.history[-1].global_norm == pytest.approx(norm.item(), rel=1e-5)
            optimizer.zero_grad()
    assert "note: the compiled kernel 'norms' and torch measured different numbers" in watch.summary()


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
