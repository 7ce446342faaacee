"""A long run holds no more memory at its end than in its middle, and writes at an even pace."""

from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.soak import soak


@pytest.mark.slow
def test_memory_and_files_of_a_long_run_grow_as_planned(tmp_path: Path) -> None:
    rows = soak(2000, tmp_path / "run", parts=4)
    # Counts are asserted, times are not.
    assert rows[-1]["mb"] - rows[1]["mb"] < 20
    growth = [b["bytes"] - a["bytes"] for a, b in pairwise(rows)]
    assert max(growth[1:]) < 1.5 * growth[0]
