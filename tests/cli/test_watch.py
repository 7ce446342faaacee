from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest

from gradwatch.cli import FINE, FOUND, USAGE, main
from gradwatch.cli._live import look
from gradwatch.runs import read_run

from .conftest import write_run


def test_watch_once_shows_layers_and_incidents(spiked, capsys) -> None:
    assert main(["watch", str(spiked), "--once", "--fail-on", "warning"]) == FOUND
    said = capsys.readouterr().out
    assert said.startswith("spiked Toy: step 59 (over, 1 steps/s), lr 0.001\n")
    assert "decoder.weight" in said
    assert "open" in said


def test_watch_ends_when_the_run_is_complete(healthy, capsys) -> None:
    assert main(["watch", str(healthy), "--json"]) == FINE
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    told = json.loads(lines[0])
    assert (told["step"], told["over"], told["incidents"]) == (59, True, [])


def test_worst_layer_stands_first(tmp_path) -> None:
    frame = look(read_run(write_run(tmp_path / "run", steps=40, spike=39)))
    assert [layer.ratio for layer in frame.layers] == [1000.0, 1000.0]
    assert frame.last["global_norm"] == pytest.approx(np.sqrt(1 + 0.01 + 4) * 1000)


def test_run_without_records_can_be_watched(tmp_path, capsys) -> None:
    assert main(["watch", str(write_run(tmp_path / "run", steps=0)), "--once"]) == FINE
    assert capsys.readouterr().out.startswith("run Toy: step -1")


def test_log_of_another_program_can_not(tmp_path, capsys) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("step,loss\n0,1\n1,1\n")
    assert main(["watch", str(log)]) == USAGE
    assert "`watch` takes a run folder" in capsys.readouterr().err


@pytest.mark.parametrize("every", ["0", "-1", "nan"])
def test_cadence_must_be_above_zero(every, healthy, capsys) -> None:
    assert main(["watch", str(healthy), f"--every={every}"]) == USAGE


@pytest.mark.slow
def test_ctrl_c_ends_the_view_of_a_running_job_with_0(healthy) -> None:
    meta = json.loads((healthy / "meta.json").read_text())
    meta["sessions"][-1] |= {"finished": None, "complete": False}
    (healthy / "meta.json").write_text(json.dumps(meta))
    command = [sys.executable, "-m", "gradwatch", "watch", str(healthy), "--json", "--every", "0.2"]
    # A test run in a shell's background ignores Ctrl-C, and so would its children: here somebody types it.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, preexec_fn=listen) as job:
        try:
            assert job.stdout is not None
            assert json.loads(job.stdout.readline())["over"] is False
            time.sleep(0.3)
            job.send_signal(signal.SIGINT)
            assert job.wait(timeout=30) == FINE
        finally:
            job.kill()


def test_a_run_that_is_not_there_yet_is_waited_for(tmp_path) -> None:
    command = [sys.executable, "-m", "gradwatch", "watch", str(tmp_path / "soon"), "--json", "--every", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        try:
            assert job.stderr is not None
            assert "waiting for a run at" in job.stderr.readline()
            write_run(tmp_path / "soon", steps=40)
            told = json.loads(job.communicate(timeout=120)[0].splitlines()[-1])
        finally:
            job.kill()
    assert (told["step"], told["over"]) == (39, True)


@pytest.mark.parametrize("options", [["--once"], ["--wait", "0.1", "--every", "0.05"]])
def test_a_run_that_does_not_come_is_an_error(options, tmp_path, capsys) -> None:
    assert main(["watch", str(tmp_path / "never"), *options]) == USAGE
    assert "there is no run" in capsys.readouterr().err
