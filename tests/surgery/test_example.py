"""The example runs, in few steps."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

EXAMPLE = Path(__file__).parents[2] / "examples" / "multitask_surgery.py"


@pytest.mark.slow
def test_example_learns_with_every_method(capsys) -> None:
    results = runpy.run_path(str(EXAMPLE))["main"](["--steps", "60"])
    assert set(results) == {"plain sum", "pcgrad", "cagrad"}
    assert all(0.2 < accuracy <= 1 for pair in results.values() for accuracy in pair)
    assert "conflicts" in capsys.readouterr().out
