"""What counts as agreement between a kernel and the reference: all that rounding can do, and nothing else."""

import math

import numpy as np
import pytest
import torch

from gradwatch.stats._reference import agrees

NAN = math.nan
MOMENTS = [1.0, 4.0, 2.0, 0.0, 3.0]
"""Sum, sum of squares, zeros, values that are not finite, largest magnitude."""


def moments(**changed: float) -> list[float]:
    names = ("sum", "squares", "zeros", "bad", "most")
    return [changed.get(name, value) for name, value in zip(names, MOMENTS, strict=True)]


@pytest.mark.parametrize(
    ("found", "is_agreement"),
    [
        pytest.param(moments(), True, id="equal"),
        pytest.param(moments(squares=4.0 + 1e-7), True, id="rounded"),
        pytest.param(moments(squares=4.0 + 1e-5), False, id="more-than-rounded"),
        pytest.param(moments(sum=1.0 + 1e-9), True, id="a-sum-of-both-signs"),
        pytest.param(moments(sum=1.0 + 1e-6), False, id="another-sum"),
        pytest.param(moments(zeros=3.0), False, id="one-zero-more"),
        pytest.param(moments(bad=1e-9), False, id="a-count-is-exact"),
        pytest.param(moments(most=3.0 + 1e-8), False, id="a-maximum-is-exact"),
        pytest.param(moments(most=NAN), False, id="nan-where-there-is-none"),
    ],
)
@pytest.mark.parametrize("name", ["moments", "everything"])
def test_moments_agree_but_for_rounding_and_counts_exactly(found: list[float], is_agreement: bool, name: str) -> None:
    piece = torch.ones(100)
    assert agrees(name, np.array([found]), np.array([MOMENTS]), [piece]) is is_agreement


def test_what_is_nan_agrees_with_what_is_nan() -> None:
    both = np.array([moments(sum=NAN, squares=NAN, most=NAN)])
    assert agrees("moments", both, both.copy(), [torch.ones(4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_a_processor_flushes_to_zero_is_no_disagreement(dtype: torch.dtype) -> None:
    pieces = [torch.ones(8, dtype=dtype)]
    least = torch.finfo(dtype).tiny
    assert agrees("squares", np.zeros((1, 1)), np.array([[least]]), pieces)
    assert not agrees("squares", np.zeros((1, 1)), np.array([[least * 1e6]]), pieces)


def test_a_histogram_agrees_where_every_count_is_equal() -> None:
    counts = np.arange(512.0)[None]
    other = counts.copy()
    other[0, 500] += 1e-5
    assert agrees("histograms", counts, counts.copy(), [torch.ones(4)])
    assert not agrees("histograms", other, counts, [torch.ones(4)])
