"""Many tensors looked at together on a device give the numbers that each gives alone."""

from __future__ import annotations

import pytest
import torch

from gradwatch.stats import _packed as packed
from gradwatch.stats import exponent_histograms, gradient_details, row_spread

KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def odd_ones(dtype: torch.dtype) -> list[torch.Tensor]:
    """Small and large tensors, empty ones, one of nan alone, zeros of both signs, infinities, subnormal numbers."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in [(3, 4), (0,), (70_000,), (5,), (100, 100), (1,), (2, 0)]]
    tensors[0].view(-1)[0] = torch.nan
    tensors[3][1:3] = torch.tensor([0.0, -0.0])
    tensors[4][0, :3] = torch.tensor([torch.inf, -torch.inf, 1e-40])
    return [*tensors, torch.full((2,), torch.nan, dtype=dtype), torch.zeros(7, dtype=dtype)]


@pytest.mark.parametrize("room", [1 << 19, 10_100, 100])
@pytest.mark.parametrize("dtype", KINDS)
def test_packed_tensors_are_counted_bit_for_bit_as_each_alone(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, room: int
) -> None:
    monkeypatch.setattr(packed, "_ROOM", room)
    tensors = odd_ones(dtype)
    rows, counts = packed.counted(tensors, details=True, histograms=True)
    alone = gradient_details(tensors)
    assert counts is not None
    assert rows is not None
    assert torch.equal(counts, exponent_histograms(tensors))
    assert torch.equal(rows, torch.cat([alone.sums, alone.maxima], dim=1))


def test_what_was_not_asked_for_is_not_counted() -> None:
    assert packed.counted(odd_ones(torch.float32)) == (None, None)


@pytest.mark.parametrize("room", [1 << 19, 40])
def test_weights_of_one_shape_spread_as_each_alone(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(4, 5) for _ in range(5)] + [torch.randn(3, 2, 2), torch.zeros(4, 5), torch.randn(3, 2, 2)]
    weights[3][0, 0] = torch.nan
    weights += [weights[0].to(torch.complex64), torch.ones(5), weights[1].to(torch.float8_e5m2)]
    each = torch.cat([row_spread([weight]) for weight in weights])
    monkeypatch.setattr("gradwatch.stats._spread._ROOM", room)
    torch.testing.assert_close(row_spread(weights), each, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("weight", "spread"),
    [
        pytest.param([[2.0]], 0.0, id="a-single-weight"),
        pytest.param([[1.0, -2.0]], 0.0, id="a-single-row"),
        pytest.param([[1.0, -2.0], [1.0, -2.0]], 0.0, id="units-never-told-apart"),
        pytest.param([[1.0, -2.0], [1.0, -1.0]], 0.5, id="half-of-the-largest"),
        pytest.param([[1.0, -2.0], [1.0, 2.0]], 2.0, id="opposite"),
        pytest.param([[0.0, 0.0], [0.0, 0.0]], 0.0, id="zeros"),
        pytest.param([1.0, 2.0], float("nan"), id="no-rows"),
        pytest.param([[], []], float("nan"), id="empty"),
    ],
)
def test_the_spread_of_rows_is_the_widest_column_over_the_largest_weight(weight: list, spread: float) -> None:
    found = row_spread([torch.tensor(weight)])
    torch.testing.assert_close(found, torch.tensor([spread], dtype=torch.float64), equal_nan=True)


@pytest.mark.parametrize("room", [1 << 19, 30])
@pytest.mark.parametrize("dtype", KINDS[:3])
def test_small_tensors_counted_one_by_one_are_counted_bit_for_bit_as_each_alone(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, room: int
) -> None:
    monkeypatch.setattr(packed, "_ROOM", room)
    tensors = [t for t in odd_ones(dtype) if 0 < t.numel() < 1 << 16]
    found = packed.counted_apart(tensors)
    assert found is not None
    zeros, largest, counts = found
    alone = gradient_details(tensors)
    assert torch.equal(counts, exponent_histograms(tensors))
    assert torch.equal(torch.stack(zeros), alone.sums[:, 0])
    assert torch.equal(torch.stack(largest), alone.maxima[:, 0])
    assert torch.equal(counts[:, 255] + counts[:, 511], alone.sums[:, 1].long())


@pytest.mark.parametrize(
    "tensors", [[torch.ones(70_000)], [torch.ones(2), torch.ones(0)], [torch.ones(2), torch.ones(2).half()]]
)
def test_large_empty_and_mixed_tensors_are_not_counted_one_by_one(tensors: list[torch.Tensor]) -> None:
    assert packed.counted_apart(tensors) is None
    assert packed.counted_apart([t.double() for t in tensors[:1]]) is None
