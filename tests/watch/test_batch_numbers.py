"""Numbers of a batch: what is told of inputs and targets side by side."""

import numpy as np
import pytest
import torch
from torch import Tensor

from gradwatch.watch._batch import batch_scalars

G = torch.Generator().manual_seed(0)
ROWS, SERIES = torch.randn(16, 6, generator=G), torch.randn(16, 24, 2, generator=G)
OUTPUTS = torch.zeros(16, 4)


def told(x: Tensor, y: Tensor) -> float | None:
    value = batch_scalars((x, y), OUTPUTS[:, : y[0].numel()]).get("target_in_inputs")
    return None if value is None else float(value)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        pytest.param(SERIES, SERIES[:, -4:, 0], 1.0, id="the-end-of-a-sequence"),
        pytest.param(SERIES, SERIES[:, -4:, 1:], 1.0, id="the-end-of-its-second-channel"),
        pytest.param(SERIES, SERIES[:, :4, 0], 0.0, id="to-be-remembered"),
        pytest.param(SERIES, SERIES[:, -4:, 0] + 1e-6, 0.0, id="next-to-it"),
        pytest.param(SERIES[..., :1], SERIES[:, -20:, 0], None, id="to-be-reconstructed"),
        pytest.param(ROWS, ROWS[:, 3], 1.0, id="a-column"),
        pytest.param(ROWS[:, 3:4].repeat(1, 6), ROWS[:, 3], 0.0, id="all-there-is-to-copy"),
        pytest.param(SERIES[..., :1], SERIES[:, -4:, 0], 1.0, id="the-end-of-one-series"),
        pytest.param(ROWS.double(), ROWS[:, 3:4], 1.0, id="a-column-of-another-dtype"),
        pytest.param(ROWS, ROWS, None, id="an-autoencoder"),
        pytest.param(ROWS, ROWS[:, 3].roll(1), 0.0, id="another-sample's"),
        pytest.param(torch.ones(16, 6), torch.ones(16), 0.0, id="nothing-varies"),
        pytest.param(ROWS[:4], ROWS[:4, 3], None, id="few-rows"),
        pytest.param(ROWS.to_sparse(), ROWS[:, 3], None, id="sparse"),
        pytest.param(ROWS, torch.arange(16) % 3, None, id="classes"),
    ],
)
def test_targets_that_stand_in_the_inputs(x: Tensor, y: Tensor, expected: float | None) -> None:
    assert told(x, y) == expected


@pytest.mark.parametrize("size", [8, 1000, 2**16])
def test_the_number_that_most_targets_are_and_the_farthest_of_them(size: int) -> None:
    y = torch.randn(size, generator=G).round() * 2 + 1  # odd numbers, often the same
    y[: size // 2 : 2] = 300.0
    x, outputs = torch.randn(size, 3, generator=G), torch.zeros(size, 1)
    found = {name: float(value) for name, value in batch_scalars((x, y[:, None]), outputs).items()}
    numbers, counts = np.unique(y.numpy(), return_counts=True)
    assert found["target_mode_share"] == pytest.approx(counts.max() / size)
    assert found["target_mode"] in numbers[counts == counts.max()]
    distances = np.abs(y.double().numpy() - float(y.median()))
    middle = float(np.sort(distances)[(size - 1) // 2])
    assert found["target_tail"] == pytest.approx(distances.max() / middle, nan_ok=True)


def test_of_more_targets_than_are_quickly_sorted_and_of_a_handful_neither_is_told() -> None:
    for size in (7, 2**16 + 1):
        y = torch.ones(size, 1)
        assert not {"target_mode", "target_tail"} & batch_scalars((torch.randn(size, 3), y), y * 0).keys()
