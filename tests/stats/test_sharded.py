"""Gradients that lie in pieces on several ranks are measured as wholes, with as few collectives as can be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stats.sharded_cases import CASES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("world", sorted({world for _, world in CASES.values()}))
def test_pieces_are_measured_as_wholes_with_one_collective_per_sharded_mesh_dimension(world: int, tmp_path) -> None:
    names = [name for name, (_, size) in CASES.items() if size == world]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.stats.sharded_cases"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path / "store"), *names],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(outputs)
    for name in names:
        assert f"passed {name}" in outputs[0]
