"""Records leave memory only when they are known to be written; what had to be let go is counted and told."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from gradwatch.errors import ConfigError, GradwatchWarning, RunFormatError
from gradwatch.protocols import RunMeta
from gradwatch.records import Incident, TreatmentReport
from gradwatch.runs import read_run
from gradwatch.sinks import RunFolder, _segments, blocks
from gradwatch.sinks._buffer import Buffer, Held

from .made import INDEX, mixed_index, record


def opened(path, **options):
    folder = RunFolder(path, **options)
    folder.open(RunMeta())
    return folder


@pytest.fixture
def disk(monkeypatch):
    """A disk that takes no blocks while `fails` holds an error."""
    state = {"fails": None}
    real = _segments.Segments.append

    def append(self, block):
        if state["fails"] is not None:
            raise state["fails"]
        return real(self, block)

    monkeypatch.setattr(_segments.Segments, "append", append)
    return state


def flush(folder):
    folder._recorder.flush(insist=True)


def test_write_that_fails_once_loses_nothing_and_is_told_with_when_it_went_on(tmp_path, disk):
    folder = opened(tmp_path)
    folder.write(record(0))
    flush(folder)
    disk["fails"] = OSError(5, "Input/output error")
    folder.write(record(1))
    flush(folder)
    with pytest.warns(
        GradwatchWarning, match=r"recording stopped at step 1: input/output error\. The training goes on"
    ):
        folder.write(record(2))
    assert folder.trouble == "input/output error"
    disk["fails"] = None
    flush(folder)
    with pytest.warns(
        GradwatchWarning, match="stopped at step 1: input/output error; it went on at 2; 0 records missing"
    ):
        folder.write(record(3))
    folder.close()
    run = read_run(tmp_path)
    assert run.steps().tolist() == [0, 1, 2, 3]
    assert run.health.num_missing == 0


def test_gap_of_a_disk_that_was_full_for_long_is_on_record(tmp_path, disk, monkeypatch):
    folder = opened(tmp_path, buffer_mb=0.05)
    monkeypatch.setattr(folder._recorder._journal, "append", lambda *_, **__: False)
    for t in range(10):
        folder.write(record(t))
    flush(folder)
    disk["fails"] = OSError(28, "No space left on device")
    folder.write(record(10))
    flush(folder)
    with pytest.warns(GradwatchWarning, match="recording stopped at step 10: no space left on device"):
        folder.write(record(11))
    for t in range(12, 300):
        folder.write(record(t))
    disk["fails"] = None
    flush(folder)
    with pytest.warns(GradwatchWarning, match=r"it went on at 299; \d+ records missing"):
        folder.close()
    run = read_run(tmp_path)
    with pytest.warns(GradwatchWarning, match="recording stopped at 9: no space left on device; went on at"):
        steps = run.steps().tolist()
    assert steps[:10] == list(range(10))
    assert steps[-1] == 299
    assert run.health.num_missing == 300 - len(steps) > 0
    assert run.health.gaps[0].endswith(f"{300 - len(steps):,} records missing")


def test_what_is_held_in_memory_thins_before_it_shrinks_and_spares_what_tells_something():
    index = mixed_index(100, 0)
    buffer = Buffer(80_000)
    clip = (TreatmentReport(name="clip", applied=True),)
    buffer.note_incident(5)
    for t in range(60):
        more = {"treatments": clip} if t == 30 else {}
        buffer.add(Held(t, record(t, index, **more), 0))
    kept = {held.number: bool(held.record.columns) for held in buffer.held}
    assert list(kept) == list(range(60))
    assert [n for n in range(24) if kept[n]] == list(range(22))
    assert kept[30]
    assert kept[59]
    assert sum(kept.values()) < 60
    assert buffer.size <= 80_000
    for t in range(60, 300):
        buffer.add(Held(t, record(t, index), 0))
    assert buffer.size <= 80_000
    assert buffer.dropped == 300 - len(buffer.held) > 0
    assert buffer.held[-1].number == 299


def test_disk_that_hangs_holds_no_step_and_what_it_did_not_take_stands_in_the_journal(tmp_path, monkeypatch):
    gate, waiting = threading.Event(), threading.Event()
    real = _segments.Segments.append

    def append(self, block):
        waiting.set()
        gate.wait()
        return real(self, block)

    monkeypatch.setattr(_segments.Segments, "append", append)
    folder = opened(tmp_path, flush_records=10)
    for t in range(500):
        folder.write(record(t))
    assert waiting.wait(20)
    assert len(read_run(tmp_path)) == 500
    gate.set()
    folder.close()
    assert read_run(tmp_path).steps().tolist() == list(range(500))


def test_record_that_was_kept_before_it_was_judged_is_there_once(tmp_path):
    folder = opened(tmp_path)
    early = [record(t) for t in range(3)]
    for each in early:
        folder.arrived(each)
        folder.arrived(each)
    assert len(read_run(tmp_path)) == 3
    flush(folder)
    folder = reopened(folder)
    for each in (early[0], record(1, norm=7.0)):
        folder.arrived(each) if each is early[0] else None
        folder.write(each)
    assert [r.global_norm for r in read_run(tmp_path).records()] == [1.0, 7.0]
    folder.close()
    assert [r.global_norm for r in read_run(tmp_path).records()] == [1.0, 7.0]


def reopened(folder):
    folder.close()
    return opened(folder.path)


def test_judged_record_takes_the_place_of_the_one_that_was_kept_early(tmp_path):
    folder = opened(tmp_path)
    for t in range(3):
        folder.arrived(record(t))
    for t in range(3):
        folder.write(record(t, norm=5.0))
    assert [r.global_norm for r in read_run(tmp_path).records()] == [5.0] * 3
    folder.close()
    assert [r.global_norm for r in read_run(tmp_path).records()] == [5.0] * 3


def test_columns_about_incidents_are_thinned_last(tmp_path):
    index = mixed_index(2000, 0)
    folder = opened(tmp_path, limit_mb=2, flush_records=16)
    rng = np.random.default_rng(0)
    for t in range(1200):
        values = rng.random(2000).astype(np.float32).astype(np.float64)
        folder.write(record(t, index, columns={"grad_norm": values}, masks={}))
        if t == 300:
            folder.incident(Incident(rule="exploding", first_step=300, last_step=300))
        if t % 100 == 99:
            folder.flush()
    folder.close()
    steps = read_run(tmp_path).steps("grad_norm")
    assert ((steps >= 284) & (steps <= 316)).sum() == 33
    assert len(steps) < 500


# Who may write


def test_copying_a_folder_that_is_written_frees_neither_it_nor_locks_the_copy(tmp_path):
    folder = opened(tmp_path / "run")
    folder.write(record(0))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(ConfigError, match="is being written by this process"):
        RunFolder(tmp_path / "run").open(RunMeta())
    copy = opened(tmp_path / "copy")
    copy.close()
    folder.close()
    opened(tmp_path / "run").close()


def lock(folder, **other):
    folder.mkdir(exist_ok=True)
    opened_once = opened(folder)
    owner = json.loads((folder / ".lock").read_text())
    opened_once.close()
    (folder / ".lock").write_text(json.dumps({**owner, **other}))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"pid": 2**22 + 1}, id="gone"),
        pytest.param({"pid": os.getppid(), "start": "1"}, id="another-process-of-its-number"),
        pytest.param({"pid": -1}, id="no-process"),
        pytest.param({"pid": "x" * 50}, id="nonsense"),
    ],
)
def test_lock_of_a_process_that_is_no_more_is_free(tmp_path, other):
    lock(tmp_path / "run", **other)
    sink = opened(tmp_path / "run")
    assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    sink.close()


@pytest.mark.parametrize("text", ["", "{", "[1]", "\\0" * 30, '{"pid": 1e999}'])
def test_lock_that_says_nothing_is_free(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    sink = opened(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    sink.close()


def test_lock_on_a_machine_that_is_not_seen_is_held_while_it_is_touched(tmp_path):
    lock(tmp_path / "run", host="elsewhere/boot/pid")
    path = tmp_path / "run" / ".lock"
    stop = threading.Event()

    def touch():
        while not stop.wait(0.3):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(ConfigError, match=r"is being written by process \d+ on elsewhere"):
            RunFolder(tmp_path / "run").open(RunMeta())
    finally:
        stop.set()
        thread.join()
    os.utime(path, (1, 1))
    opened(tmp_path / "run").close()


@pytest.mark.parametrize("name", [".lock", "meta.json", "incidents.jsonl", "records-01-000001.gwr", "index-000.json"])
def test_link_in_a_folder_is_refused_and_what_it_points_to_untouched(tmp_path, name):
    (tmp_path / "run").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run" / name).symlink_to(victim)
    with pytest.raises(RunFormatError, match=r"is a symbolic link: what belongs to a run folder lies in it"):
        RunFolder(tmp_path / "run").open(RunMeta())
    assert victim.read_text() == "precious"


def test_pipe_in_a_folder_keeps_no_reader_waiting(tmp_path):
    opened(tmp_path).close()
    os.mkfifo(tmp_path / "incidents.jsonl")
    with pytest.warns(GradwatchWarning, match="no regular file"):
        assert read_run(tmp_path).incidents == []


# What a folder says of itself


@pytest.mark.parametrize(
    ("end", "state", "words"),
    [
        pytest.param(lambda f: f.summary("all well"), "complete", "complete", id="complete"),
        pytest.param(lambda f: f.ended("interrupted"), "interrupted", "interrupted in training step 3", id="ctrl-c"),
        pytest.param(
            lambda f: f.ended("crashed: ValueError: no"),
            "crashed",
            "crashed (ValueError in training step 3)",
            id="crashed",
        ),
        pytest.param(lambda f: None, "interrupted", "closed before its end", id="closed"),
    ],
)
def test_folder_says_how_its_run_ended(tmp_path, end, state, words):
    folder = opened(tmp_path)
    for t in range(3):
        folder.write(record(t))
    assert read_run(tmp_path).health.state == "running"
    end(folder)
    folder.close()
    health = read_run(tmp_path).health
    assert (health.state, health.words, health.num_missing) == (state, words, 0)


def test_run_that_came_to_its_end_is_not_complete_where_records_are_missing(tmp_path):
    folder = opened(tmp_path)
    for t in range(8):
        folder.write(record(t))
        if t % 2:
            flush(folder)
    folder.summary("all well")
    folder.close()
    (file,) = tmp_path.glob("records*")
    (end, _), *_ = blocks.scan(file.read_bytes())
    file.write_bytes(file.read_bytes()[end:])
    run = read_run(tmp_path)
    with pytest.warns(GradwatchWarning, match="2 records at the beginning and before step 2 are missing"):
        assert len(run) == 6
    assert run.health.state == "recording failed"


TERM = textwrap.dedent("""
    import os, signal, sys
    from gradwatch.protocols import RunMeta
    from gradwatch.sinks import RunFolder
    from tests.sinks.made import record
    said = []
    if sys.argv[2] == "own":
        signal.signal(signal.SIGTERM, lambda number, frame: said.append(number))
    folder = RunFolder(sys.argv[1])
    folder.open(RunMeta())
    for t in range(20):
        folder.write(record(t))
    os.kill(os.getpid(), signal.SIGTERM)
    assert said == [signal.SIGTERM], said
    folder.close()
    assert signal.getsignal(signal.SIGTERM).__name__ == "<lambda>"
""")


@pytest.mark.slow
@pytest.mark.parametrize(("handler", "code"), [("none", -signal.SIGTERM), ("own", 0)])
def test_sigterm_saves_what_there_is_and_goes_where_it_would_have_gone(tmp_path, handler, code):
    done = subprocess.run([sys.executable, "-c", TERM, str(tmp_path), handler], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    run = read_run(tmp_path)
    assert len(run) == 20
    if handler == "none":
        assert run.health.words == "terminated (SIGTERM) in training step 20"


def test_thread_of_a_folder_ends_with_it(tmp_path):
    def threads():
        return [t for t in threading.enumerate() if t.name == "gradwatch-recorder"]

    before = len(threads())
    folder = opened(tmp_path)
    assert len(threads()) == before + 1
    folder.close()
    end = time.monotonic() + 10
    while len(threads()) > before and time.monotonic() < end:
        time.sleep(0.01)
    assert len(threads()) == before
    assert INDEX


def test_where_a_recording_stopped_is_where_the_journal_ends_and_not_the_blocks(tmp_path, disk):
    folder = opened(tmp_path)
    for step in range(5):
        folder.write(record(step))
    disk["fails"] = OSError(5, "Input/output error")
    flush(folder)
    with pytest.warns(GradwatchWarning, match="recording stopped at step 4: input/output error"):
        folder.write(record(5))
    disk["fails"] = None
    with pytest.warns(GradwatchWarning, match="it went on at 5; 0 records missing"):
        folder.close()


def test_folder_that_is_removed_while_it_is_written_is_told_with_all_its_records(tmp_path):
    folder = opened(tmp_path / "run")
    for step in range(5):
        folder.write(record(step))
    shutil.rmtree(tmp_path / "run")
    with pytest.warns(GradwatchWarning) as told:
        folder.close()
    assert str(told[-1].message).endswith(" failed: no such file or directory; 5 records missing.")


def test_run_whose_disk_syncs_nothing_is_complete_where_it_was_written(tmp_path, monkeypatch):
    folder = opened(tmp_path)
    folder.write(record(0))
    folder.summary("words")

    def fsync(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.warns(GradwatchWarning, match="recording stopped at step 0: input/output error"):
        folder.close()
    run = read_run(tmp_path)
    assert (run.steps().tolist(), run.complete) == ([0], True)
