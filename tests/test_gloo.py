"""Ranks of tests end as `tests.gloo` has them end, and their errors are told."""

from pathlib import Path

import pytest
import torch.multiprocessing as mp

from tests import gloo

ROOT = Path(__file__).parents[1]


def fails(rank: int, culprit: int) -> None:
    if rank == culprit:
        raise KeyError("of this rank")


@pytest.mark.slow
def test_an_error_of_a_rank_is_raised() -> None:
    with pytest.raises(mp.ProcessRaisedException, match="of this rank"):
        gloo.spawn(fails, (1,))


def test_no_test_starts_ranks_that_take_their_interpreter_down() -> None:
    files = ROOT.glob("tests/**/*.py")
    own = Path(gloo.__file__)
    starts = ("mp" + ".spawn(", "start_" + "processes(", "multiprocessing" + ".spawn(")
    assert [f for f in files if f != own and any(start in f.read_text() for start in starts)] == []
    assert starts[0] in own.read_text()
