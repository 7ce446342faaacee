"""Ranks hold the same bits: a flipped one is found, and the rank is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gradwatch.torchside import _bits, checksum
from gradwatch.watch._contributions import BROUGHT, HELD, Contributions, farther_rank
from gradwatch.watch._rank_spread import RankSpread
from gradwatch.watch._replicas import _WIDE, Replicas, _parts, odd_rank

from ..modes.ranks import run_group
from . import rank_cases


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def outcomes(request, tmp_path_factory) -> dict[str, str]:
    return run_group(rank_cases.__name__, request.param, Path(tmp_path_factory.mktemp("ranks")), list(rank_cases.CASES))


@pytest.mark.parametrize("case", rank_cases.CASES)
def test_ranks(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8])
def test_every_single_bit_shows_in_what_travels(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(9) if dtype.is_floating_point else torch.randint(0, 256, (9,))
    tensor = tensor.to(dtype)

    def code() -> tuple[float, ...]:
        return tuple(_parts(checksum(tensor)[None])[0].tolist())

    whole, words = code(), tensor.view(torch.uint8)
    for place in range(8 * len(words)):
        words[place // 8] ^= 1 << place % 8
        found = code()
        words[place // 8] ^= 1 << place % 8
        assert found != whole
        assert all(0 <= part < 2**_WIDE and part == int(part) for part in found)


@pytest.mark.parametrize("num", [1, 2**17, 2**17 + 3, 70 * 2**16 + 5])
def test_a_device_sums_blocks_and_comes_to_the_same(num: int, monkeypatch) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(num)
    expected = checksum(tensor)
    monkeypatch.setattr(_bits, "is_host", lambda device: False)
    assert checksum(tensor) == expected


@pytest.mark.parametrize(
    ("codes", "changed", "rank"),
    [
        ([1, 1, 2], [0, 0, 0], 2),
        ([3, 1, 1, 1], [0, 0, 0, 0], 0),
        ([1, 2], [0, 1], 1),
        ([1, 2], [0, 0], -1),
        ([1, 2], [1, 1], -1),
        ([1, 2, 3, 1, 1], [0, 0, 0, 0, 0], -1),
        ([1, 1, 2, 2], [0, 0, 1, 0], 2),
    ],
    ids=["of-three", "of-four", "written", "of-two", "both-written", "two-odd-ones", "half-and-half"],
)
def test_the_odd_one_is_named_where_it_can_be(codes, changed, rank) -> None:
    assert odd_rank(codes, np.array(changed, float)) == rank


@pytest.mark.parametrize(
    ("weights", "gradients", "told"),
    [
        ([5, 5, 5], [7, 7, 7], {"replicas_differ": 0.0, "replica_gradients_differ": 0.0}),
        ([5, 5, 6], [7, 7, 7], {"replicas_differ": 1.0, "replica_gradients_differ": 0.0, "replica_rank": 2.0}),
        ([5, 5, 5], [8, 7, 7], {"replicas_differ": 0.0, "replica_gradients_differ": 1.0, "replica_rank": 0.0}),
        ([5, 5, 6], [8, 7, 7], {"replicas_differ": 1.0, "replica_gradients_differ": 1.0, "replica_rank": 2.0}),
    ],
    ids=["none", "weights", "gradients", "both"],
)
def test_where_weights_and_gradients_differ_the_rank_of_the_weights_is_named(
    weights: list[int], gradients: list[int], told: dict[str, float]
) -> None:
    codes = np.array([[w, 1, g, 1] for w, g in zip(weights, gradients, strict=True)], float)
    ranks = np.hstack([codes, np.zeros((3, 1)), np.ones((3, 1))])
    w, g = codes[:, :2], codes[:, 2:]
    rows = np.hstack([w, w**2, g, g**2]).sum(0)[None]
    found = dict(object.__new__(Replicas).conclude({"ranks": ranks, "rows": rows}))
    column = found.pop("replica_differs")
    assert found == told
    assert column.values.tolist() == [2.0 * (len(set(weights)) > 1) + (len(set(gradients)) > 1)]


@pytest.mark.parametrize(
    ("norms", "told"),
    [
        ([2.0, 2.0], {"rank_spread": 0.0}),
        ([1.0, 4.0, 2.0], {"rank_spread": 0.75}),
        ([0.0, 4.0], {"rank_spread": 1.0}),
        ([0.0, 0.0], {}),
        ([1.0, np.nan], {}),
        ([1.0, np.inf], {}),
    ],
    ids=["alike", "apart", "one-without", "none", "nan", "infinite"],
)
def test_how_far_the_ranks_norms_are_apart_is_told_of_numbers_alone(norms: list[float], told: dict[str, float]) -> None:
    assert object.__new__(RankSpread).conclude({"norms": np.array(norms)}) == told


@pytest.mark.parametrize(
    ("given", "missing", "rank"),
    [
        ({}, (), -1),
        ({0: 1.0}, (), 0),
        ({1: 1.0}, (), 1),
        ({0: 1e-3, 1: 1.0}, (), 1),
        ({0: 1.0, 1: 1.0}, (), -1),  # equally far from the mean: nobody can tell
        ({1: 1.0}, (0,), -1),
        ({1: np.nan}, (), 1),
    ],
    ids=["none", "first", "second", "farther", "as-far", "brought-by-one-alone", "not-finite"],
)
def test_of_two_ranks_the_one_whose_gradient_is_not_the_mean_of_what_both_brought_is_named(
    given: dict[int, float], missing: tuple[int, ...], rank: int
) -> None:
    """`given`: what is added to an entry on a rank after gradients were put together; `missing`: who brought none."""
    torch.manual_seed(0)
    brought, device = torch.randn(2, 40), torch.device("cpu")
    host = {name: np.zeros(shape) for name, shape in Contributions.tables(1).items()}
    for number in range(2):
        p, seen = torch.nn.Parameter(torch.zeros(40)), Contributions()
        seen.listen([] if number in missing else [p])
        (p * brought[number]).sum().backward()
        p.grad = brought.mean(0)
        p.grad[7] += given.get(number, 0.0)
        gave, holds = seen.take([p], {id(p): p.grad}, device)
        host[BROUGHT] += gave.numpy()
        host[HELD][number] = holds.numpy()
    assert farther_rank(host, [0]) == rank
    assert farther_rank(host, []) == farther_rank({}, [0]) == -1
