"""Every statistic of every dtype, layout and value is what float64 numpy says."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradwatch.stats import _native as native_module
from gradwatch.stats import (
    exponent_histograms,
    extent,
    global_norm,
    gradient_details,
    measure_gradients,
    moments,
    num_beyond,
    num_nonfinite,
    second_look,
    tensor_norms,
)

from .layouts import LAYOUTS, SPARSE, Layout, elements

WIDE = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHORT = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]
NUMBERS = [0.0, -0.0, 1.0, -2.5, 7.0, -5.0, 1e-45, -1e-40, 3e-39, 1e-38, 1e-6, -6e4, 1e38, -3e38, math.inf, -math.inf]
values = st.lists(st.sampled_from([*NUMBERS, math.nan]), min_size=12, max_size=12)
by_name = {"ids": lambda layout: layout.name}


def matrix(numbers: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).view(4, 3).to(dtype)


def norm_of(e: np.ndarray) -> float:
    most = np.abs(e).max(initial=0.0)
    if not np.isfinite(most) or most == 0:
        return float("nan") if np.isnan(e).any() else float(most)
    return float(most * np.sqrt(np.square(e / most).sum()))


def histogram_of(e: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        codes = np.ascontiguousarray(e.ravel(), np.float64).astype(np.float32).view(np.uint32) >> 23
    return np.bincount(codes, minlength=512)


def folded(counts: np.ndarray) -> np.ndarray:
    """Return counts without the sign of zeros and nan, which a layout need not keep."""
    counts = np.array(counts)
    for bin_ in (0, 255):
        counts[bin_], counts[256 + bin_] = counts[bin_] + counts[256 + bin_], 0
    return counts


def check(tensor: Tensor, e: np.ndarray) -> None:
    """Compare every public statistic of one tensor with those of its elements."""
    e = np.asarray(e, np.float64)
    finite, norm = bool(np.isfinite(e).all()), norm_of(e)
    zeros, bad = int((e == 0).sum()), int((~np.isfinite(e)).sum())
    most = float(np.abs(e[~np.isnan(e)]).max(initial=0.0))
    total, sumsq, *rest = moments(tensor).tolist()
    assert rest == [zeros, bad, most]
    with np.errstate(all="ignore"):
        squares = norm * norm
    np.testing.assert_allclose(sumsq, squares, rtol=6e-6, atol=1e-300)
    if finite:
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(total, e.sum(), rtol=0, atol=2e-6 * np.abs(e).sum() + 1e-44)
    else:
        assert not math.isfinite(total)
    assert extent(tensor).tolist() == [sumsq, bad, most] or math.isnan(sumsq)
    assert float(num_nonfinite(tensor)) == bad
    assert int(num_beyond(tensor, 5.0)) == (np.abs(e) >= 5).sum()
    for found in (tensor_norms([tensor]), second_look([tensor]), measure_gradients([tensor]).norms):
        np.testing.assert_allclose(found.item(), norm, rtol=3e-6)
    counts = histogram_of(e)
    whole = measure_gradients([tensor], histograms=True)
    assert whole.histograms is not None
    np.testing.assert_array_equal(folded(whole.histograms[0].numpy()), folded(counts))
    np.testing.assert_array_equal(folded(exponent_histograms([tensor])[0].numpy()), folded(counts))
    details = gradient_details([tensor])
    for sums, maxima in ((details.sums, details.maxima), (whole.sums, whole.maxima)):
        assert (sums[0].tolist(), maxima.item()) == ([zeros, bad], most)


@pytest.mark.parametrize("layout", LAYOUTS, **by_name)
@given(numbers=values, dtype=st.sampled_from(WIDE))
@settings(max_examples=20, deadline=None, database=None, derandomize=True)
def test_no_layout_changes_a_statistic(layout: Layout, numbers: list[float], dtype: torch.dtype) -> None:
    x = matrix(numbers, dtype)
    check(layout.make(x), layout.twin(elements(x)))


@pytest.mark.parametrize("layout", SPARSE, **by_name)
@given(numbers=values, dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=10, deadline=None, database=None, derandomize=True)
@pytest.mark.filterwarnings("ignore")
def test_zeros_that_are_not_stored_count_as_zeros(layout: Layout, numbers: list[float], dtype: torch.dtype) -> None:
    x = matrix(numbers, dtype)
    check(layout.make(x), layout.twin(elements(x)))


@pytest.mark.parametrize("dtype", [*SHORT, torch.int64, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize(
    "layout", [one for one in LAYOUTS if "negated" not in one.name and one.name != "subclass"], **by_name
)
def test_no_dtype_changes_a_statistic(layout: Layout, dtype: torch.dtype) -> None:
    if layout.name == "zeros-without-memory" and dtype is torch.float8_e8m0fnu:
        return  # it has no zero
    x = torch.tensor([0.0, 1.0, -2.0, 4.0, 0.0, 8.0, 1.0, 0.5, -16.0, 2.0, 1.0, -0.25]).view(4, 3)
    x = (x.abs() if dtype is torch.float8_e8m0fnu else x).to(dtype)
    check(layout.make(x), layout.twin(elements(x)))


@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize("layout", [one for one in LAYOUTS if one.name not in ("negated", "negated-column")], **by_name)
def test_a_complex_tensor_counts_by_its_real_and_imaginary_parts(layout: Layout, conjugate: bool) -> None:
    real, imaginary = torch.randn(2, 4, 3)
    imaginary[0] = 0.0
    x = torch.complex(real, imaginary)
    made = layout.make(x.conj() if conjugate else x)
    twins = [layout.twin(elements(real)), layout.twin(elements(-imaginary if conjugate else imaginary))]
    check(made, np.stack([np.ravel(twin) for twin in twins]))


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_tensor_counts_as_what_it_stands_for() -> None:
    x = torch.quantize_per_tensor(torch.randn(5, 4), 0.5, 0, torch.qint8)
    check(x, elements(x.dequantize()))
    check(x.t(), elements(x.dequantize()))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, **by_name)
def test_large_tensors_of_every_layout_have_the_same_statistics(layout: Layout, dtype: torch.dtype) -> None:
    x = (torch.randn(30_000, 3, generator=torch.Generator().manual_seed(0)).relu() - 0.1).to(dtype)
    x[5], x[:, 0] = 0.0, x[:, 0] * 1000
    tensor, e = layout.make(x), layout.twin(elements(x))
    zeros, most = int((e == 0).sum()), float(np.abs(e).max(initial=0.0))
    total, sumsq, *rest = moments(tensor).tolist()
    assert rest == [zeros, 0, most]
    np.testing.assert_allclose([total, sumsq], [e.sum(), np.square(e).sum()], rtol=1e-5)
    np.testing.assert_allclose(tensor_norms([tensor]).item(), norm_of(e), rtol=1e-6)
    whole = measure_gradients([tensor], histograms=True)
    np.testing.assert_array_equal(whole.histograms[0].numpy(), histogram_of(e))
    assert int(num_beyond(tensor, 5.0)) == (np.abs(e) >= 5).sum()


@pytest.mark.parametrize("layout", LAYOUTS, **by_name)
@given(numbers=values, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
@settings(max_examples=15, deadline=None, database=None, derandomize=True)
def test_compiled_kernels_take_any_layout(layout: Layout, numbers: list[float], dtype: torch.dtype) -> None:
    kernels = native_module._load()
    if kernels is None or layout.name == "subclass":
        return
    x = matrix(numbers, dtype)
    tensor, e = layout.make(x), np.ravel(layout.twin(elements(x)))
    rows = kernels.run("moments", [tensor])
    zeros, bad = int((e == 0).sum()), int((~np.isfinite(e)).sum())
    assert rows[0, 2:].tolist() == [zeros, bad, float(np.abs(e[~np.isnan(e)]).max(initial=0.0))]
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(rows[0, 1], np.square(e).sum(), rtol=1e-9)
        np.testing.assert_allclose(kernels.run("squares", [tensor])[0, 0], np.square(e).sum(), rtol=1e-9)
    np.testing.assert_array_equal(folded(kernels.run("histograms", [tensor])[0]), folded(histogram_of(e)))


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e-30, 1.0, 1e30, 1e160, 1e214, 1e300])
def test_global_norm_is_right_wherever_float64_can_hold_it(scale: float) -> None:
    norms = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64) * scale
    assert global_norm(norms).item() == pytest.approx(5.0 * scale, rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("size", [1025, 4096, 4097, 8192, 20_000, 200_000])
def test_a_norm_of_equal_elements_keeps_six_digits(size: int, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(native_module, "_load", lambda: None)
    for number in (0.1, 1 / 3, 1.1, 0.7, 3e-5):
        x = torch.full((size,), number, dtype=dtype)
        assert tensor_norms([x]).item() == pytest.approx(float(x[0]) * math.sqrt(size), rel=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-37, 1e-30, 1e-16, 1e16, 1e30])
def test_many_tensors_of_one_extreme_scale_keep_their_digits(scale: float, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(native_module, "_load", lambda: None)
    generator = torch.Generator().manual_seed(0)
    sizes = [0, 1, 1000, 2000, 5000, 9000, 60_000, 70_000, 3000] + [1500] * 20
    tensors = [(torch.randn(size, generator=generator) * scale).to(dtype) for size in sizes]
    expected = [norm_of(elements(tensor)) for tensor in tensors]
    np.testing.assert_allclose(tensor_norms(tensors).numpy(), expected, rtol=2e-6)
