"""Two gloo ranks: same weights, same parameters, and one ordinary backward that DDP reduces."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytorch_lightning")

from tests.gloo import spawn

from .ddp_case import CASES, main


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(main, (str(folder), port))
    return folder


def load(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(CASES))
def test_ranks_stay_bitwise_identical(results, case) -> None:
    for kind in ("surgery", "direct"):
        first, second = (load(results, f"{case}-{kind}-{rank}") for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        weights = [load(results, f"{case}-{kind}-{rank}-weights") for rank in range(2)]
        assert weights[0] == weights[1]
        assert any(w != 1 for w in weights[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(CASES))
def test_surgery_is_bitwise_the_module_that_does_it_by_hand(results, case) -> None:
    ours, by_hand = load(results, f"{case}-surgery-0"), load(results, f"{case}-by_hand-0")
    assert all(torch.equal(ours[name], by_hand[name]) for name in ours)


@pytest.mark.slow
def test_direct_combination_is_reduced_too(results) -> None:
    ours, by_hand = load(results, "plain-direct-0"), load(results, "plain-by_hand-0")
    for name in ours:
        torch.testing.assert_close(ours[name], by_hand[name], rtol=1e-4, atol=1e-6)
