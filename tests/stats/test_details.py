"""Largest element, zeros, non-finite: by hand and against torch."""

import math

import pytest
import torch

from gradwatch.stats import exponent_histograms, extent, gradient_details, moments

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_details_of_a_tensor_that_can_be_counted_by_hand() -> None:
    details = gradient_details(
        [torch.tensor([0.0, -0.0, 3.0, -5.0]), torch.tensor([math.nan, 1.0, 0.0]), torch.tensor([-math.inf, math.nan])]
    )
    assert details.sums.tolist() == [[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]]
    assert details.maxima.tolist() == [[5.0], [1.0], [math.inf]]
    assert details.reduce_() is details


def test_details_of_nothing() -> None:
    details = gradient_details([torch.zeros(0), torch.tensor(math.nan)])
    assert details.sums.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert details.maxima.tolist() == [[0.0], [0.0]]
    assert gradient_details([]).sums.shape == (0, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 1000, 65536, 70_001])
def test_details_and_moments_agree_with_torch(dtype: torch.dtype, size: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).relu().to(dtype)
    x[0] = -3.0
    details = gradient_details([x])
    assert details.sums[0].tolist() == [(x == 0).sum().item(), 0.0]
    assert details.maxima.item() == x.abs().max().item()
    total, sumsq, zeros, nonfinite, absmax = moments(x).tolist()
    assert total == pytest.approx(x.double().sum().item(), rel=1e-5, abs=1e-4)
    assert sumsq == pytest.approx(x.double().square().sum().item(), rel=2e-6)
    assert (zeros, nonfinite, absmax) == ((x == 0).sum().item(), 0.0, x.abs().max().item())
    assert extent(x).tolist() == [sumsq, nonfinite, absmax]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_moments_show_non_finite_elements(bad: float) -> None:
    total, sumsq, zeros, nonfinite, absmax = moments(torch.tensor([0.0, 2.0, bad, -3.0])).tolist()
    assert not math.isfinite(total)
    assert not math.isfinite(sumsq)
    assert (zeros, nonfinite) == (1.0, 1.0)
    assert absmax == (3.0 if math.isnan(bad) else math.inf)


@pytest.mark.parametrize("exponent", [-30, -20, 0, 15])
def test_moments_keep_their_digits_at_every_scale(exponent: int) -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10.0**exponent
    sumsq = moments(x)[1].item()
    assert sumsq == pytest.approx(x.double().square().sum().item(), rel=2e-6, abs=0)


def codes(values: torch.Tensor) -> torch.Tensor:
    """The slow reference: exponents by frexp, in float64."""
    wide = values.double()
    _, exponent = torch.frexp(wide)
    bins = (exponent.long() - 1 + 127).clamp(0, 254)
    bins[wide.abs() < 2.0**-126] = 0
    bins[~torch.isfinite(wide) | (wide.abs() >= 2.0**128)] = 255
    return bins + 256 * torch.signbit(wide)


def test_powers_of_two_fall_into_their_own_bins() -> None:
    counts = exponent_histograms([torch.tensor([1.0, 1.5, 2.0, -0.5, 0.0, -0.0, math.inf, -math.inf])])[0]
    assert {k: counts[k].item() for k in counts.nonzero().flatten().tolist()} == {
        127: 2,
        128: 1,
        256 + 126: 1,
        0: 1,
        256: 1,
        255: 1,
        256 + 255: 1,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 3, 65535, 65537, 150_000])
def test_exponent_histograms_agree_with_frexp(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = (torch.randn(size, generator=generator) * 2.0 ** torch.randint(-60, 60, (size,), generator=generator)).to(dtype)
    expected = torch.bincount(codes(x), minlength=512)
    counts = exponent_histograms([torch.ones(2), x])
    assert counts.dtype == torch.int64
    assert counts[0].sum().item() == 2
    assert torch.equal(counts[1], expected)


def test_float32_denormals_and_float64_extremes_go_to_the_outer_bins() -> None:
    counts = exponent_histograms([torch.tensor([1e-40]), torch.tensor([1e300, -1e-300], dtype=torch.float64)])
    assert counts[0, 0].item() == 1
    assert counts[1, 255].item() == 1
    assert counts[1, 256].item() == 1


def test_float16_denormals_are_no_float32_denormals() -> None:
    counts = exponent_histograms([torch.tensor([2.0**-24], dtype=torch.float16)])
    assert counts[0, 127 - 24].item() == 1


def test_histograms_of_parts_add_up_to_that_of_the_whole() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(exponent_histograms(x.split(3000)).sum(dim=0), exponent_histograms([x])[0])
