"""The page of modes lists the tests that there are."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_table_in_the_docs_is_made_from_the_tests() -> None:
    done = subprocess.run([sys.executable, "tools/modes_table.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run `python tools/modes_table.py`"
