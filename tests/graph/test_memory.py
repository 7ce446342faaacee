"""What a watched training holds, each in a fresh process: as many tensors and bytes as the bare one, at every step."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradwatch.watch._batch import batch_scalars
from gradwatch.watch._prediction import blocks, predicted

from .test_user_graph import run

CASES = [
    ("plain", "everything"),
    ("plain", "full"),
    ("fabric", "everything"),
    ("accelerate", "everything"),
    ("lightning", "everything"),
    ("lightning, manual", "default"),
    ("hf", "everything"),
]
LOGITS = 4 * 16 * 4000 * 4


@pytest.mark.slow
@pytest.mark.parametrize(("program", "arm"), CASES)
def test_as_many_tensors_and_bytes_are_held_watched_and_bare(program: str, arm: str) -> None:
    found: Any = run("tests.graph.memory", program, arm)
    watched, bare = found["watched"], found["bare"]
    name = "outputs left at the next forward"
    assert (watched[name], watched["tensors"], watched["bytes"]) == (bare[name], bare["tensors"], bare["bytes"])
    assert watched["peak"] - bare["peak"] <= LOGITS / 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 5), (40, 3), (6, 900, 70), (300, 1000), (7,), (4, 3, 50, 60)])
def test_numbers_of_an_output_taken_in_pieces_are_those_of_the_whole(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    pred = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole, found = pred.double(), predicted(pred).scalars
    assert float(found["output_min"]) == whole.min()
    assert float(found["output_max"]) == whole.max()
    if shape[0] > 1:
        torch.testing.assert_close(
            found["output_batch_variance"], whole.reshape(len(whole), -1).var(0, correction=0).max()
        )
    if len(shape) > 1:
        sums = whole.sum(1)
        torch.testing.assert_close(found["output_row_sum_min"], sums.min())
        torch.testing.assert_close(found["output_row_sum_max"], sums.max())


@pytest.mark.parametrize("keep", [0, 1, -1])
def test_pieces_are_all_of_a_tensor_and_small(keep: int) -> None:
    x = torch.arange(2.0**20).view(8, 2**9, 2**8).transpose(1, 2)
    pieces = list(blocks(x, keep=keep))
    assert sum(float(p.double().sum()) for p in pieces) == float(x.double().sum())
    assert max(p.numel() for p in pieces) <= 2**13
    assert all(p.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for p in pieces)
    assert {p.shape[keep] for p in pieces} == {x.shape[keep]} or keep == -1


def test_losses_by_formula_taken_in_pieces_are_those_of_the_whole() -> None:
    made = torch.Generator().manual_seed(0)
    pred, labels = torch.randn(500, 90, generator=made), torch.randint(0, 90, (500,), generator=made)
    labels[3] = -100
    found = batch_scalars(targets=labels, outputs=pred)

    def agrees(name: str, expected: Tensor) -> None:
        torch.testing.assert_close(torch.as_tensor(found[name]), expected.double(), rtol=1e-6, atol=1e-9)

    rows, whole = F.one_hot(labels.clamp(min=0), 90) * (labels >= 0)[:, None], pred.double()
    agrees("cross_entropy", F.cross_entropy(whole, labels))
    agrees("cross_entropy_twice", F.cross_entropy(whole.softmax(1), labels))
    agrees("cross_entropy_over_batch", -(rows * whole.log_softmax(0)).sum() / rows.sum())
    truth = torch.randn(500, 90, generator=made)
    found = batch_scalars(targets=truth, outputs=pred)
    agrees("squared_error", F.mse_loss(whole, truth.double()))
    agrees("target_variance", truth.double().var(0, correction=0).mean())
