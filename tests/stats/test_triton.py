"""The CUDA kernels' arithmetic, without a device: Triton interprets them (`pip install triton`; CPU builds lack it)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton")
@pytest.mark.timeout(600)
def test_float32_lanes_come_to_the_sums_of_float64() -> None:
    # A kernel is compiled or interpreted for good when its module is imported.
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    found = subprocess.run(
        [sys.executable, "-m", "tests.stats.triton_case"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-3000:]
