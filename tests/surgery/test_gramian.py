"""The quick Gramian against the exact one."""

from __future__ import annotations

import pytest
import torch

from gradwatch.stats import gramian
from gradwatch.treatments.surgery._gramian import quick_gramian


def tasks(k: int, scale: float = 1.0) -> list[list[torch.Tensor | None]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 500), (70_001,), (40, 3), (5,)]
    return [[torch.randn(shape, generator=generator) * scale for shape in shapes] for _ in range(k)]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_quick_gramian_is_the_exact_one_to_a_millionth(k) -> None:
    grads = tasks(k)
    exact = gramian(grads)
    torch.testing.assert_close(
        quick_gramian(grads) / exact.diagonal().max(), exact / exact.diagonal().max(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e12, 1e20, 1e30])
def test_products_outside_float32_keep_their_digits(scale) -> None:
    grads = tasks(2, scale)
    exact = gramian(grads)
    torch.testing.assert_close(
        quick_gramian(grads) / exact.diagonal().max(), exact / exact.diagonal().max(), rtol=0, atol=1e-6
    )
    assert float(exact[0, 0]) > 0


def test_missing_sparse_half_and_strided_gradients_count() -> None:
    grads = tasks(3)
    grads[1][0] = None
    grads[0][1] = grads[0][1].bfloat16()
    grads[2][0] = torch.randn(500, 300).t()
    torch.testing.assert_close(quick_gramian(grads), gramian(grads), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_shows(bad) -> None:
    grads = tasks(2)
    grads[1][0][7, 7] = bad
    matrix = quick_gramian(grads)
    assert torch.isfinite(matrix[0, 0])
    assert not torch.isfinite(matrix[1, 1])


def test_no_gradient_at_all_is_zero() -> None:
    assert torch.equal(quick_gramian([[None, None], [None, None]]), torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(quick_gramian([[], []]), torch.zeros(2, 2, dtype=torch.float64))
