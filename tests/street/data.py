"""Small data that can be learnt: real digits, real text, and toys with a rule in them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["batches", "digits", "generator", "text"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1,797 digits of 8 x 8 pixels in [0, 1], as (n, 1, 8, 8), and their labels; shuffled.

    The file is read where scikit-learn keeps it: importing that takes longer than a program of the street.
    """
    spec = find_spec("sklearn")
    assert spec is not None, "scikit-learn is not installed"
    assert spec.origin is not None
    table = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    rows = torch.tensor(table)[torch.randperm(len(table), generator=generator())]
    return rows[:, :-1].float().view(-1, 1, 8, 8) / 16, rows[:, -1].long()


@cache
def text() -> tuple[Tensor, int]:
    """The licence of this repository as numbers of characters, and how many different ones there are."""
    words = (Path(__file__).parents[2] / "LICENSE").read_text()
    letters = sorted(set(words))
    return torch.tensor([letters.index(letter) for letter in words]), len(letters)


def batches(*data: Tensor, size: int, steps: int, seed: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """That many random batches."""
    draw = generator(seed)
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (size,), generator=draw)
        yield tuple(each[rows] for each in data)
