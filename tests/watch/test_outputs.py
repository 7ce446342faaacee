"""What is kept of losses and outputs, against torch on the whole of them."""

import pytest
import torch

from gradwatch.watch._model_meter import loss_value
from gradwatch.watch._prediction import extremes, row_sums

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_extremes_are_those_of_the_elements(dtype: torch.dtype) -> None:
    x = torch.tensor([[7, 3], [5, 9]], dtype=dtype)
    assert [float(value) for value in extremes(x)] == [3.0, 9.0]


@pytest.mark.parametrize("shape", [(3, 400_000), (400_000, 3), (600, 700), (2, 300, 1000)])
def test_sums_of_rows_are_of_whole_rows_however_large_the_output(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = x.double().sum(dim=1)
    low, high = row_sums(x)
    assert float(low) == pytest.approx(float(whole.min()), rel=1e-9)
    assert float(high) == pytest.approx(float(whole.max()), rel=1e-9)


@pytest.mark.parametrize("elements", [[4.0], [1.0, 3.0], [1.0, 2.0, 6.0]])
def test_a_loss_of_several_elements_is_their_mean(elements: list[float]) -> None:
    assert float(loss_value(torch.tensor(elements), CPU)) == pytest.approx(sum(elements) / len(elements))
