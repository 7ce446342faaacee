"""`report_to="trackio"` with a real run of Trackio, in a process of its own; `make test-loggers` has the package."""

import json
import os
import sqlite3
import subprocess
import sys
import textwrap

import pytest

TRAINING = textwrap.dedent("""
    import sys
    from pathlib import Path
    from gradwatch.callbacks.transformers import GradWatchCallback
    from tests.callbacks.hf import trainer
    watch = [GradWatchCallback(log_every=3)] if sys.argv[2] == "watched" else []
    trainer(Path(sys.argv[1]), *watch, report_to="trackio", max_steps=12).train()
""")


def stored(folder, how):
    """Return what a run of twelve steps leaves in Trackio's store: key -> (step there, value)."""
    env = {**os.environ, "TRACKIO_DIR": str(folder / how), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, str(folder / "out"), how],
        capture_output=True, text=True, timeout=250, check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (store,) = (folder / how).glob("*.db")
    found = {}
    for step, metrics in sqlite3.connect(store).execute("select step, metrics from metrics order by id"):
        for key, value in json.loads(metrics).items():
            found.setdefault(key, []).append((step, value))
    return found


@pytest.mark.slow
def test_trainers_own_numbers_stay_where_they_are_and_ours_are_in_the_same_run(tmp_path):
    pytest.importorskip("trackio")
    alone, watched = stored(tmp_path, "alone"), stored(tmp_path, "watched")
    assert watched["train/loss"] == alone["train/loss"]
    assert watched["train/global_step"] == alone["train/global_step"]
    assert [step for step, _ in watched["gradwatch/global_norm"]] == [2, 5, 8, 11]
