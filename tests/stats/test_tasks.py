"""Gramian and cosines of task gradients, and the spread of rows."""

import math

import pytest
import torch

from gradwatch.stats import cosines, gramian, row_spread


def test_gramian_of_two_tasks_by_hand() -> None:
    first = [torch.tensor([3.0, 4.0]), None]
    second = [torch.tensor([4.0, -3.0]), torch.tensor([[2.0]])]
    assert gramian([first, second]).tolist() == [[25.0, 0.0], [0.0, 29.0]]


@pytest.mark.parametrize("exponent", [-30, -10, 0, 18])
def test_gramian_agrees_with_float64_at_every_scale(exponent: int) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [[torch.randn(s, generator=generator) * 10.0**exponent for s in ((300, 1000), (7,))] for _ in range(3)]
    flat = torch.stack([torch.cat([g.double().flatten() for g in task]) for task in grads])
    found = gramian(grads)
    torch.testing.assert_close(found / 100.0**exponent, flat @ flat.T / 100.0**exponent, rtol=1e-9, atol=1e-6)
    assert torch.equal(cosines(found).diagonal().round(decimals=9), torch.ones(3, dtype=torch.float64))


def test_strides_do_not_change_an_inner_product() -> None:
    g = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert gramian([[g], [g.T.contiguous().T]]).unique().numel() == 1


def test_sparse_and_dense_gradients_of_one_parameter_meet() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([2.0, 3.0]), (4,), check_invariants=True)
    assert gramian([[sparse], [torch.ones(4)]]).tolist() == [[25.0, 5.0], [5.0, 4.0]]


def test_opposite_gradients_have_cosine_minus_one_and_zero_ones_zero() -> None:
    found = cosines(gramian([[torch.full((3,), 1e-30)], [torch.full((3,), -1.0)], [torch.zeros(3)]]))
    torch.testing.assert_close(
        found, torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    )


def test_non_finite_task_shows_in_its_own_row_only() -> None:
    found = cosines(gramian([[torch.ones(2)], [torch.tensor([math.nan, 1.0])], [torch.ones(2)]]))
    assert found[1].isnan().all()
    assert found[0, 2].item() == pytest.approx(1.0)


def test_tasks_with_different_numbers_of_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"from every task\. Got \[1, 2\] gradients"):
        gramian([[torch.ones(1)], [torch.ones(1), None]])


def test_row_spread_is_zero_exactly_where_all_units_are_equal() -> None:
    same = torch.randn(1, 5).expand(4, 5)
    spread = row_spread([torch.full((3, 3), 0.1), same, torch.tensor([[1.0, 2.0], [-1.0, 2.0]]), torch.zeros(2, 2)])
    assert spread.tolist() == [0.0, 0.0, 1.0, 0.0]
    assert row_spread([torch.ones(1, 5), torch.ones(1, 1)]).tolist() == [0.0, 0.0]  # one unit is like itself


def test_row_spread_of_vectors_is_not_defined() -> None:
    assert row_spread([torch.ones(3), torch.zeros(0, 3)]).isnan().all()
    assert row_spread([]).shape == (0,)
