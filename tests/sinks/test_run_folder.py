import copy
import json
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given, settings

from gradwatch.errors import ConfigError, GradwatchError, GradwatchWarning, RunFormatError
from gradwatch.protocols import RunMeta
from gradwatch.records import Histogram, Incident
from gradwatch.runs import read_run
from gradwatch.sinks import RunFolder, _segments, blocks

from .made import mixed_index, record, runs_of_records, same


def written(path, records, *, meta=None, incidents=(), **options):
    folder = RunFolder(path, **options)
    folder.open(meta or RunMeta(model="Net"))
    for r in records:
        folder.write(r, [r])
    for incident in incidents:
        folder.incident(incident)
    folder.close()
    return read_run(path)


@settings(max_examples=12, deadline=None)
@given(records=runs_of_records())
def test_run_is_read_back_as_it_was_written(records, tmp_path_factory):
    run = written(tmp_path_factory.mktemp("run"), records, flush_records=2)
    assert [same(a, b) for a, b in zip(records, run.records(), strict=True)] == [True] * len(records)


def test_window_is_written_whole_and_its_last_record_once(tmp_path):
    folder = RunFolder(tmp_path)
    folder.open(RunMeta())
    window = [record(t) for t in range(5)]
    folder.write(window[-1], window)
    folder.write(record(5))
    folder.close()
    assert [r.step for r in read_run(tmp_path).records()] == list(range(6))


def test_meta_says_what_the_run_is(tmp_path):
    meta = RunMeta(name="gw", model="GPT", started=5.0, versions={"torch": "2"}, options={"every": 1, "x": {3, 1}})
    found = written(tmp_path, [record(0)], meta=meta).meta
    assert found["sessions"][0].pop("finished") > 0
    assert found.pop("crc") > 0
    assert found == {
        "format": "gradwatch-run",
        "schema": 2,
        "name": "gw",
        "model": "GPT",
        "started": 5.0,
        "versions": {"torch": "2"},
        "options": {"every": 1, "x": [1, 3]},
        "limit_mb": 512.0,
        "sessions": [{"number": 1, "start_step": 0, "started": 5.0, "records": 1, "lines": [0, 0]}],
    }


def test_index_is_written_again_only_when_the_paths_change(tmp_path):
    other = mixed_index(4, 2)
    equal = mixed_index()
    run = written(tmp_path, [record(0), record(1, equal), record(2, other), record(3, other)])
    assert sorted(p.name for p in tmp_path.glob("index*")) == ["index-000.json", "index-001.json"]
    assert [len(r.index) for r in run.records()] == [5, 5, 6, 6]
    assert run.index.paths == other.paths


def test_every_record_is_readable_as_soon_as_it_was_written(tmp_path):
    folder = RunFolder(tmp_path, flush_seconds=1e9)
    folder.open(RunMeta())
    for t in range(3):
        folder.write(record(t))
    run = read_run(tmp_path)
    assert [r.step for r in run.records()] == [0, 1, 2]
    assert not list(tmp_path.glob("records*"))
    assert run.health.state == "running"
    folder.write(record(3))
    assert run.refresh()
    assert len(run) == 4
    folder.flush()
    assert not run.refresh()
    assert [len(b) for _, b in blocks.scan(next(tmp_path.glob("records*")).read_bytes())] == [4]
    folder.close()
    assert not list(tmp_path.glob("journal*"))


def blocks_written(folder, count):
    folder.open(RunMeta())
    for t in range(count):
        folder.write(record(t))
        wait_until(lambda: not folder._recorder._is_due)
    folder.close()
    (file,) = folder.path.glob("records*")
    return [len(block) for _, block in blocks.scan(file.read_bytes())]


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_blocks_are_written_by_number_and_by_size(tmp_path):
    assert blocks_written(RunFolder(tmp_path / "a", flush_records=4, flush_seconds=1e9), 10) == [4, 4, 2]
    assert blocks_written(RunFolder(tmp_path / "b", flush_mb=1e-4, flush_seconds=1e9), 3) == [1, 1, 1]


def test_incident_comes_back_with_everything_and_in_its_last_state(tmp_path):
    begun = Incident(
        rule="exploding", first_step=3, last_step=3, paths=("a", "b"), first_path="a", value=float("inf"), limit=2.0,
        treatments=("zclip",), labels={"team": "x"}, details={"autopsy": {"module": "a"}}, id=7,
    )  # fmt: skip
    over = Incident(**{**vars(begun), "resolved": True, "resolved_step": 9, "last_step": 5, "count": 3})
    run = written(tmp_path, [record(0)], incidents=[begun, over])
    assert run.incidents == [over]


def test_incident_that_merely_goes_on_does_not_grow_the_file(tmp_path):
    folder = RunFolder(tmp_path)
    folder.open(RunMeta())
    for step in range(100):
        folder.incident(Incident(rule="dead", first_step=0, last_step=step, count=step + 1, value=float("nan")))
    assert len((tmp_path / "incidents.jsonl").read_text().splitlines()) == 1
    folder.close()
    assert len((tmp_path / "incidents.jsonl").read_text().splitlines()) == 2
    assert read_run(tmp_path).incidents[0].count == 100


def test_incidents_of_two_engines_with_one_id_are_told_apart(tmp_path):
    pair = [Incident(rule=rule, first_step=0, last_step=0, id=0) for rule in ("dead", "exploding")]
    assert [i.rule for i in written(tmp_path, [record(0)], incidents=pair).incidents] == ["dead", "exploding"]


def test_every_line_of_the_incidents_is_strict_json(tmp_path):
    written(
        tmp_path,
        [record(0)],
        incidents=[Incident(rule="r", first_step=0, last_step=0, details={"v": np.float64("nan")})],
    )
    for line in (tmp_path / "incidents.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["details"] == {"v": "nan"}


# Resuming


def test_resumed_run_replaces_what_was_beyond_the_checkpoint(tmp_path):
    early = Incident(rule="dead", first_step=2, last_step=3, id=1)
    beyond = Incident(rule="exploding", first_step=8, last_step=8, id=2)
    written(tmp_path, [record(t) for t in range(10)], incidents=[early, beyond])
    run = written(tmp_path, [record(t, norm=5.0) for t in range(6, 8)], meta=RunMeta(start_step=6))
    assert [(r.step, r.global_norm) for r in run.records()] == [(t, 1.0) for t in range(6)] + [(6, 5.0), (7, 5.0)]
    assert [s["start_step"] for s in run.meta["sessions"]] == [0, 6]
    assert [i.rule for i in run.incidents] == ["dead"]


def test_incident_resolved_beyond_the_checkpoint_is_open_again(tmp_path):
    begun = Incident(rule="dead", first_step=2, last_step=3, value=0.0, limit=0.0, id=1)
    over = Incident(rule="dead", first_step=2, last_step=3, value=0.0, limit=0.0, resolved=True, resolved_step=8, id=1)
    written(tmp_path, [record(t) for t in range(10)], incidents=[begun, over])
    run = written(tmp_path, [record(6)], meta=RunMeta(start_step=6))
    assert run.incidents == [begun]


def test_run_begun_anew_in_the_same_folder_hides_the_old_one(tmp_path):
    written(tmp_path, [record(t) for t in range(10)])
    assert [r.step for r in written(tmp_path, [record(0), record(1)]).records()] == [0, 1]


def test_session_without_records_hides_nothing(tmp_path):
    written(tmp_path, [record(t) for t in range(3)])
    assert len(written(tmp_path, [], meta=RunMeta(start_step=1))) == 3


def test_resuming_after_a_cut_block_and_a_cut_line_loses_nothing_else(tmp_path):
    written(tmp_path, [record(t) for t in range(4)], incidents=[Incident(rule="dead", first_step=1, last_step=1, id=1)])
    (file,) = tmp_path.glob("records*")
    file.write_bytes(file.read_bytes() + file.read_bytes()[:50])
    with (tmp_path / "incidents.jsonl").open("a") as lines:
        lines.write('{"rule": "explo')
    later = Incident(rule="vanishing", first_step=4, last_step=4, id=2)
    run = written(tmp_path, [record(t) for t in range(4, 6)], incidents=[later], meta=RunMeta(start_step=4))
    with pytest.warns(match="line 2 can't be read"):
        incidents = run.incidents
    assert [i.rule for i in incidents] == ["dead", "vanishing"]
    assert [r.step for r in run.records()] == list(range(6))


# Folders that can't be used


def test_second_writer_of_a_folder_is_refused(tmp_path):
    first, second = RunFolder(tmp_path), RunFolder(tmp_path / "." / "")
    first.open(RunMeta())
    with pytest.raises(ConfigError, match=r"is being written by this process\. Give each run, and each GradWatch"):
        second.open(RunMeta())
    first.close()
    second.open(RunMeta())
    second.close()


def test_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "meta.json").write_text('{"a": 1}')
    with pytest.raises(RunFormatError, match="is not a gradwatch run's"):
        RunFolder(tmp_path).open(RunMeta())
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["meta.json"]


def test_folder_of_a_higher_schema_is_not_continued(tmp_path):
    (tmp_path / "meta.json").write_text('{"format": "gradwatch-run", "schema": 3}')
    with pytest.raises(RunFormatError, match="schema 3; this gradwatch continues 'gradwatch-run' up to schema 2"):
        RunFolder(tmp_path).open(RunMeta())


@pytest.mark.parametrize("option", ["limit_mb", "flush_records", "flush_seconds", "flush_mb", "buffer_mb"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_setting_that_can_not_be_is_refused(option, value):
    with pytest.raises(ConfigError, match=f"`{option}` must be above 0. Got {value}"):
        RunFolder("x", **{option: value})


def test_path_may_come_with_the_run_and_must_come_from_somewhere(tmp_path):
    folder = RunFolder()
    folder.open(RunMeta(run_dir=str(tmp_path / "deep" / "run")))
    folder.close()
    assert read_run(tmp_path / "deep" / "run").meta["name"] == "gradwatch"
    with pytest.raises(ConfigError, match="RunFolder has no path"):
        RunFolder().open(RunMeta())


def test_writing_before_open_says_so(tmp_path):
    with pytest.raises(GradwatchError, match=r"is not open: call `open\(meta\)` first"):
        RunFolder(tmp_path).write(record(0))


def test_copies_are_closed_sinks_and_leave_the_files_to_the_original(tmp_path):
    folder = RunFolder(tmp_path, limit_mb=3)
    folder.open(RunMeta())
    folder.write(record(0))
    for other in (copy.deepcopy(folder), pickle.loads(pickle.dumps(folder))):
        other.flush()
        other.close()
        assert other.path == tmp_path
    folder.write(record(1))
    folder.close()
    folder.close()
    assert len(read_run(tmp_path)) == 2


# Size


def test_folder_stays_below_its_limit_and_keeps_every_scalar(tmp_path):
    index = mixed_index(400, 0)
    rng = np.random.default_rng(0)
    counts = Histogram(np.arange(512))
    folder = RunFolder(tmp_path, limit_mb=1, flush_records=16)
    folder.open(RunMeta())
    for t in range(1200):
        values = rng.random(400).astype(np.float32).astype(np.float64)
        more = {"histograms": {"blocks.0.weight": counts}} if t % 100 == 0 else {}
        folder.write(record(t, index, columns={"grad_norm": values}, masks={}, **more))
    folder.close()
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 1.2 * 2**20
    run = read_run(tmp_path)
    assert run.thinned
    assert run.scalar("loss")[0].tolist() == list(range(1200))
    steps, matrix = run.matrix("grad_norm")
    assert 100 < len(steps) < 700
    assert steps[-1] == 1199
    assert np.diff(steps).max() < 200
    assert np.isfinite(matrix).all()


def test_a_large_models_folder_takes_six_kilobytes_a_step_and_keeps_what_is_about_an_incident(tmp_path, monkeypatch):
    monkeypatch.setattr(_segments, "FREE_BYTES", 1 << 18)
    monkeypatch.setattr(_segments, "SEGMENT_BYTES", 1 << 18)
    index, num_steps, about = mixed_index(6000, 0), 600, 100
    rng = np.random.default_rng(0)
    folder = RunFolder(tmp_path, flush_records=8)
    folder.open(RunMeta())
    for t in range(num_steps):
        values = rng.random(6000).astype(np.float32).astype(np.float64)
        folder.write(record(t, index, columns={"grad_norm": values}, masks={}))
        if t == about:
            folder.incident(Incident(rule="exploding", first_step=about, last_step=about))
    folder.close()
    size = sum(path.stat().st_size for path in tmp_path.glob("records-*"))
    assert 2 << 10 < size / num_steps <= 6 << 10
    run = read_run(tmp_path)
    assert run.scalar("loss")[0].tolist() == list(range(num_steps))
    steps, _ = run.matrix("grad_norm")
    assert set(range(about - 10, about + 11)) <= set(steps.tolist())
    assert len(steps) < num_steps / 3


def test_superseded_files_go_first_when_room_is_needed(tmp_path):
    index = mixed_index(400, 0)
    for _ in range(2):
        run = written(tmp_path, [record(t, index, norm=0.1) for t in range(250)], limit_mb=1, flush_records=16)
    assert not run.thinned
    assert len(list(run.records())) == 250


# Ends that come without warning

CHILD = textwrap.dedent("""
    import sys, os, signal
    from gradwatch.protocols import RunMeta
    from gradwatch.records import Incident
    from gradwatch.sinks import RunFolder, SafeSinks
    from tests.sinks.made import record
    folder = RunFolder(sys.argv[1], flush_seconds=1e9, flush_records=10)
    sinks = SafeSinks([folder])
    sinks.open(RunMeta())
    for t in range(int(sys.argv[2])):
        sinks.push(record(t))
        if t == 20:
            sinks.incident(Incident(rule="dead", first_step=20, last_step=20))
    if sys.argv[3] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
""")


def run_child(*arguments, check=True, program=CHILD):
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_sigkill_loses_nothing(tmp_path):
    assert run_child(tmp_path, 55, "kill", check=False).returncode == -signal.SIGKILL
    run = read_run(tmp_path)
    assert [r.step for r in run.records()] == list(range(55))
    assert [i.rule for i in run.incidents] == ["dead"]
    assert run.health.state == "lost"
    assert len(written(tmp_path, [record(55)], meta=RunMeta(start_step=55))) == 56


@pytest.mark.slow
def test_interpreter_that_ends_without_close_loses_nothing_and_says_so(tmp_path):
    run_child(tmp_path, 55, "end")
    run = read_run(tmp_path)
    assert len(run) == 55
    assert run.health.words == "not closed: the program ended in training step 55"


@pytest.mark.slow
def test_folder_held_by_another_process_is_refused_and_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.open(RunMeta())
    done = run_child(tmp_path, 5, "end")
    folder.close()
    assert "RunFolder failed while opening: ConfigError" in done.stderr
    assert "is being written by process" in done.stderr


FULL = textwrap.dedent("""
    import resource, signal, sys, warnings
    from gradwatch.protocols import RunMeta
    from gradwatch.sinks import MemorySink, RunFolder, SafeSinks
    from tests.sinks.made import mixed_index, record
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    memory = MemorySink()
    sinks = SafeSinks([RunFolder(sys.argv[1], flush_records=10), memory])
    sinks.open(RunMeta())
    index = mixed_index(400, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(100):
            sinks.push(record(t, index, norm=0.1))
        sinks.close()
    assert len(memory.records) == 100
    for w in caught:
        print(w.category.__name__, w.message)
""")


@pytest.mark.slow
def test_disk_that_stays_full_is_told_and_what_was_written_stays_readable(tmp_path):
    done = run_child(tmp_path, program=FULL)
    lines = done.stdout.splitlines()
    # Where a block is done before the next one is tried, the limit on a file's size lets writing go on for a while.
    stopped = [line for line in lines if "recording stopped at step" in line and "it went on at" not in line]
    went_on = [line for line in lines if "it went on at" in line]
    (last,) = [line for line in lines if " failed: " in line]
    assert stopped[0].startswith("GradwatchWarning")
    assert all("file too large. The training goes on; records are held in memory" in line for line in stopped)
    assert "failed: file too large;" in last
    assert all(" takes its time while " in line for line in lines if line not in (*stopped, *went_on, last))
    run = read_run(tmp_path)
    with pytest.warns(GradwatchWarning, match=r"recording stopped after step \d+: file too large; \d+ records missing"):
        steps = run.steps().tolist()
    assert steps == list(range(len(steps)))
    assert len(steps) >= 10
    assert run.index.paths == mixed_index(400, 0).paths
    assert run.health.state == "recording failed"
    assert run.health.num_missing == 100 - len(steps)
    assert "file too large" in str(run.health)
