"""Norms against float64 references: over sizes, scales, dtypes and layouts."""

import math

import pytest
import torch
from torch import Tensor

from gradwatch.stats import global_norm, second_look, tensor_norms
from gradwatch.stats._shards import alike

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(), (1,), (3, 5), (0,), (65536,), (65537,), (70001,), (512, 400), (3, 64, 7, 7), (100_003,)]


def reference(tensors: list[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(t.double()) for t in tensors])


def test_norm_of_three_and_four_is_five() -> None:
    norms = tensor_norms([torch.tensor([3.0, 4.0]), torch.tensor([[0.0]]), torch.ones(2, 2)])
    assert norms.dtype == torch.float64
    assert norms.tolist() == [5.0, 0.0, 2.0]
    assert global_norm(norms).item() == pytest.approx(math.sqrt(29), rel=1e-12)


def test_no_tensors_have_no_norms_and_a_global_norm_of_zero() -> None:
    assert tensor_norms([]).shape == (0,)
    assert global_norm(tensor_norms([])).item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("measure", [tensor_norms, second_look])
def test_norms_agree_with_float64_to_1e_6(measure, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    torch.testing.assert_close(measure(tensors), reference(tensors), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("exponent", range(-36, 37, 6))
def test_norms_keep_their_digits_at_every_scale(dtype: torch.dtype, exponent: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(n, generator=generator).double().mul(10.0**exponent).to(dtype) for n in (17, 70_000)]
    torch.testing.assert_close(tensor_norms(tensors), reference(tensors), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1000, 8000, 8193, 100_000])
def test_equal_elements_whose_rounding_errors_add_up_are_within_1e_5(size: int) -> None:
    tensors = [torch.full((size,), value) for value in torch.linspace(0.1, 1, 40).tolist()]
    torch.testing.assert_close(tensor_norms(tensors), reference(tensors), rtol=1e-5, atol=0)


def test_float64_gradients_of_1e_200_are_not_lost() -> None:
    norms = tensor_norms([torch.full((100,), 1e-200, dtype=torch.float64), torch.ones(4, dtype=torch.float64)])
    torch.testing.assert_close(norms, torch.tensor([1e-199, 2.0], dtype=torch.float64), rtol=1e-12, atol=0)


def test_float16_whose_own_norm_overflows_is_exact() -> None:
    tensor = torch.full((1000, 1000), 100.0, dtype=torch.float16)
    assert torch.linalg.vector_norm(tensor).isinf()
    assert tensor_norms([tensor]).item() == pytest.approx(1e5, rel=1e-6)


def test_many_small_values_beside_a_large_one_are_not_swallowed() -> None:
    tensor = torch.full((4_000_000,), 1e-3)
    tensor[0] = 10.0
    assert tensor_norms([tensor]).item() == pytest.approx(math.sqrt(100 + 4 - 1e-6), rel=3e-6)


@pytest.mark.parametrize("size", [3, 70_000])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_elements_show_in_their_own_norm_only(size: int, bad: float) -> None:
    tensor = torch.ones(size)
    tensor[size // 2] = bad
    norms = tensor_norms([torch.ones(4), tensor, torch.zeros(7)])
    assert norms[[0, 2]].tolist() == [2.0, 0.0]
    assert math.isnan(norms[1]) if math.isnan(bad) else norms[1] == math.inf
    torch.testing.assert_close(second_look([tensor])[0], norms[1], equal_nan=True)


def test_largest_float32_values_have_a_finite_norm() -> None:
    tensor = torch.full((70_000,), 3e38)
    assert tensor_norms([tensor]).item() == pytest.approx(float(tensor[0]) * math.sqrt(70_000), rel=1e-6)


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.randn(8, 16, 32, 32).to(memory_format=torch.channels_last), id="channels-last"),
        pytest.param(torch.randn(300, 400).T, id="transposed"),
        pytest.param(torch.randn(400, 400)[:, ::2], id="strided"),
        pytest.param(torch.randn(1).expand(100), id="expanded"),
        pytest.param(torch.randn(4, 4)[1:3, 1:3], id="window"),
        pytest.param(torch.randn(100, dtype=torch.complex64), id="complex"),
        pytest.param(torch.randn(50).to(torch.float8_e4m3fn), id="fp8"),
        pytest.param(torch.randn(200, 400)[50:], id="offset"),
    ],
)
def test_layout_does_not_change_a_norm(tensor: Tensor) -> None:
    wide = torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()
    expected = torch.linalg.vector_norm(wide)
    torch.testing.assert_close(tensor_norms([tensor])[0], expected, rtol=1e-6, atol=0)


def test_sparse_duplicates_are_added_before_squaring() -> None:
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[0, 0, 2]]), torch.tensor([[1.0], [2.0], [4.0]]), (5, 1), check_invariants=True
    )
    assert tensor_norms([sparse, torch.ones(1)]).tolist() == [5.0, 1.0]


def test_mixed_dtypes_come_back_in_the_order_given() -> None:
    tensors = [torch.full((4,), v, dtype=d) for v, d in zip((1.0, 2.0, 3.0, 4.0), (*DTYPES[::-1],), strict=True)]
    assert tensor_norms(tensors).tolist() == [2.0, 4.0, 6.0, 8.0]


def test_norms_do_not_touch_the_gradients() -> None:
    tensors = [torch.randn(70_000), torch.full((5,), 1e-30)]
    before = [t.clone() for t in tensors]
    tensor_norms(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.slow
def test_one_hundred_million_elements_are_exact_to_1e_6() -> None:
    tensor = torch.randn(100_000_000, generator=torch.Generator().manual_seed(0))
    expected = math.sqrt(sum(c.double().square().sum().item() for c in tensor.split(1 << 20)))
    assert tensor_norms([tensor]).item() == pytest.approx(expected, rel=1e-6)


def test_what_one_kernel_is_given_is_of_one_device_and_one_dtype() -> None:
    short, wide, far = torch.ones(2, dtype=torch.float16), torch.ones(3), torch.ones(2, device="meta")
    assert alike([short, wide, short]) == [[0, 2], [1]]
    assert alike([wide, far, wide, short]) == [[0, 2], [1], [3]]
    assert alike([wide, wide]) == [[0, 1]]
