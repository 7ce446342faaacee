"""Samples of tensors of any kind: a change of all their elements shows, bit for bit, and nothing else does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradwatch.torchside import Samples, unlike

KINDS = {
    "float": torch.randn(70, 3),
    "scalar": torch.tensor(2.0),
    "half": torch.randn(9).bfloat16(),
    "double": torch.randn(300).double(),
    "complex": torch.randn(5, 2, dtype=torch.complex64),
    "whole numbers": torch.arange(7),
    "flags": torch.zeros(5, dtype=torch.bool),
    "turned": torch.randn(6, 4).t(),
    "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "every other": torch.randn(40)[::2],
    "parameter": nn.Parameter(torch.randn(4)),
    "nan": torch.full((3,), torch.nan),
    "sparse": torch.eye(4).to_sparse(),
}


def change(tensor: Tensor) -> None:
    with torch.no_grad():
        if tensor.is_sparse:
            tensor._values().add_(1)
        elif tensor.dtype is torch.bool:
            tensor.logical_not_()
        elif tensor.isnan().any():
            tensor.fill_(0.0)
        else:
            tensor.add_(1)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_change_of_all_elements_shows(kind: str) -> None:
    tensor = KINDS[kind].clone()
    others = [torch.randn(5), torch.ones(2, dtype=torch.int64)]
    samples = Samples([others[0], tensor, others[1]], 4)
    before = samples.now()
    assert not bool(unlike(before, samples.now()))
    change(tensor)
    assert bool(unlike(before, samples.now()))


def test_elements_are_spread_over_the_whole_tensor() -> None:
    seen = 0
    for place in range(64):
        tensor = torch.zeros(640)
        samples = Samples([tensor], 64)
        before = samples.now()
        tensor[place * 10 : place * 10 + 10] = 1.0
        seen += bool(unlike(before, samples.now()))
    assert seen == 64


def test_nothing_is_seen_of_what_has_no_elements() -> None:
    samples = Samples([torch.empty(0, 3), torch.empty(2, device="meta")])
    assert samples.now() == []
    assert not bool(unlike([], []))


def test_other_tensors_and_tensors_that_lie_elsewhere_are_others() -> None:
    tensors = [torch.randn(3), torch.randn(3)]
    samples = Samples(tensors)
    assert samples.are_of(list(tensors))
    assert not samples.are_of(tensors[:1])
    assert not samples.are_of([tensors[0], torch.randn(3)])
    tensors[1].data = torch.randn(3)
    assert not samples.are_of(tensors)
