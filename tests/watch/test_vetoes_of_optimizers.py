"""A skipped step is skipped by every optimizer of torch, by those of libraries that are installed, by awkward ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from _optimizers import Case, cases
from vetoes import STEPS, trial

from gradwatch.watch import CLEAN

CPU = torch.device("cpu")
CASES = {case.name: case for case in cases(CPU)}
QUICK = ["torch SGD momentum 0.9, fused", "torch AdamW foreach", "torch LBFGS", "SAM(SGD), by two calls"]


def _is_clean(case: Case) -> bool:
    name = case.name.partition(" ")[0] == "torch" and f"torch.optim.{case.name.split()[1]}"
    return name in CLEAN


@pytest.mark.parametrize("name", [n for n in QUICK if n in CASES])
def test_a_skipped_step_moves_nothing(name: str) -> None:
    assert trial(CASES[name], CPU).word in ("clean", "undone")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bad", [0, 7], ids=["first", "eighth"])
def test_a_skipped_step_moves_nothing_of_any_optimizer(name: str, bad: int) -> None:
    assert bad < STEPS
    outcome = trial(CASES[name], CPU, bad=bad)
    assert outcome.word in ("clean", "undone", "-"), outcome
    if _is_clean(CASES[name]):
        assert outcome.word == "clean"
