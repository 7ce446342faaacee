"""The scripts that are kept for a machine that is not at hand run here, small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


def test_the_script_for_a_gpu_runs_whole_on_a_cpu(tmp_path: Path) -> None:
    done = run("benchmarks/gpu.py", "--dry", "--minutes", "4", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    found = {part: [(what, value) for p, what, value in rows if p == part] for part, _, _ in rows}
    assert set(found) == {"machine", "tests", "waits", "truth", "overhead", "kernels"}
    for part, told in found.items():
        assert not any(value.startswith(("left out", "FAILED")) or what == "FAILED" for what, value in told), (
            part,
            told,
        )
    assert any("gradwatch, defaults" in what for what, _ in found["overhead"])
    assert ("nan at 0 and 5, fused AdamW", "skipped [0, 5], weights finite") in found["truth"]
    assert any("exploding" in value for what, value in found["truth"] if "1e4" in what)
