"""A sink that raised is tried again, gets what waited for it, and what it missed is told."""

import os

import pytest

from gradwatch.errors import GradwatchWarning
from gradwatch.protocols import RunMeta
from gradwatch.records import Incident
from gradwatch.runs import read_run
from gradwatch.sinks import MemorySink, RunFolder, SafeSinks, _trouble
from gradwatch.sinks._lane import MAX_WAITING

from .made import record


@pytest.fixture
def clock(monkeypatch):
    """The clock of pauses, that stands still until it is moved."""
    now = [0.0]
    monkeypatch.setattr(_trouble, "monotonic", lambda: now[0])
    return now


def dead(step=0):
    return Incident(rule="dead", first_step=step, last_step=step)


def push_all(sinks, steps, clock=None, seconds=0.0):
    """Push records, and move the clock before each; return the tries of the first sink after each."""
    tries = []
    for step in range(steps):
        if clock is not None:
            clock[0] += seconds
        sinks.push(record(step))
        tries.append(getattr(sinks._sinks[0], "tries", 0))
    return tries


class Broken(MemorySink):
    """Raises in every call as long as it has an error."""

    def __init__(self, error=None):
        super().__init__()
        self.error, self.tries = error, 0

    def _try(self):
        self.tries += 1
        if self.error is not None:
            raise self.error

    def open(self, meta):
        self._try()
        super().open(meta)

    def write(self, record, window=()):
        self._try()
        super().write(record, window)

    def incident(self, incident):
        self._try()
        super().incident(incident)


@pytest.mark.parametrize("threaded", [False, True], ids=["at-once", "in-a-thread"])
def test_sink_that_failed_is_tried_again_after_pauses_that_double_and_gets_what_waited(clock, threaded):
    sink = Broken(ConnectionError("gone"))
    sink.never_hangs = not threaded
    sinks = SafeSinks([sink], log_every=1)
    with pytest.warns(GradwatchWarning, match="failed while opening: ConnectionError: gone. It is tried again") as told:
        sinks.open(RunMeta())
    tries = push_all(sinks, 40, clock, 0.25)
    sinks.incident(dead(3))
    assert (sinks.sinks, sinks.notes) == ((), ["sink Broken failed: ConnectionError: gone"])
    sink.error = None
    clock[0] += 60
    with pytest.warns(GradwatchWarning) as back:
        sinks.push(record(40))
    # Pauses of 1/4, 1/2, 1, 2, 4, ... seconds.
    assert [step for step in range(40) if tries[step] > (tries[step - 1] if step else 1)] == [0, 2, 6, 14, 30]
    assert sink.steps == list(range(41))
    assert len(sink.incidents) == 1
    assert len(told) == 1
    assert [str(w.message) for w in back] == [
        "Broken failed at step 0: ConnectionError: gone; it went on at step 40; 0 records were not handed to it."
    ]
    assert sinks.sinks == (sink,)
    assert not sinks.failed


def test_what_does_not_fit_while_a_sink_fails_is_counted_and_told_once(clock):
    sink = Broken()
    sinks = SafeSinks([sink], log_every=1)
    sinks.open(RunMeta())

    def outage():
        sink.error = OSError(28, "No space left on device")
        push_all(sinks, MAX_WAITING + 50)
        sink.error = None
        clock[0] += 60
        sinks.push(record(MAX_WAITING + 50))

    with pytest.warns(GradwatchWarning) as caught:
        outage()
    outage()  # warnings are errors here
    assert len(sink.steps) == 2 * MAX_WAITING + 2
    assert len(caught) == 2
    assert "it went on at step 4,146; 50 records were not handed to it." in str(caught[1].message)
    assert sinks.notes == ["sink Broken missed records: 100"]


def test_what_waits_for_a_sink_takes_little_memory_where_records_are_large(clock):
    index = record(0).index
    big = record(0, columns={"grad_norm": [0.0] * len(index)} | {f"c{i}": [0.0] * len(index) for i in range(20_000)})
    sinks = SafeSinks([Broken(OSError("gone"))], log_every=1)
    with pytest.warns(GradwatchWarning):
        sinks.push(big)
    for _ in range(199):
        sinks.push(big)
    paused = next(iter(sinks._paused.values()))
    size = sum(call.size for call in paused.waiting)
    assert 200 * paused.waiting[0].size > 80 << 20
    assert size <= 64 << 20
    assert paused.num_records == 200


def test_call_that_can_not_be_made_does_not_keep_the_others_from_a_sink(clock):
    class Choosy(Broken):
        def write(self, record, window=()):
            self.error = ValueError("what is this?") if record.step == 3 else None
            super().write(record, window)

    sink = Choosy()
    sinks = SafeSinks([sink], log_every=1)
    with pytest.warns(GradwatchWarning):
        push_all(sinks, 9, clock, 60)
    assert sink.steps == [0, 1, 2, 4, 5, 6, 7, 8]
    assert sinks.notes == ["sink Choosy missed records: 1"]


def test_folder_that_could_not_be_opened_is_opened_later_and_nothing_is_missing(tmp_path, clock, monkeypatch):
    real, full = os.write, [True]

    def write(file, data):
        if full:
            raise OSError(28, "No space left on device")
        return real(file, data)

    monkeypatch.setattr(os, "write", write)
    sinks = SafeSinks([RunFolder(tmp_path / "run")])
    with pytest.warns(GradwatchWarning, match="RunFolder failed while opening") as caught:
        sinks.open(RunMeta())
    push_all(sinks, 100)
    assert sinks.trouble == "OSError: [Errno 28] No space left on device"
    full.clear()
    clock[0] += 60
    with pytest.warns(GradwatchWarning, match="it went on at step 100; 0 records were not handed to it"):
        sinks.push(record(100))
    assert sinks.trouble == ""
    sinks.close()
    assert len(caught) == 1
    assert read_run(tmp_path / "run").steps().tolist() == list(range(101))


def test_records_that_did_not_fit_before_a_folder_could_be_opened_are_a_gap_on_record(tmp_path, clock):
    (tmp_path / "run").write_text("in the way")
    sinks = SafeSinks([RunFolder(tmp_path / "run")])
    with pytest.warns(GradwatchWarning, match="failed while opening"):
        sinks.open(RunMeta())
    push_all(sinks, MAX_WAITING + 70)
    (tmp_path / "run").unlink()
    clock[0] += 60
    with pytest.warns(GradwatchWarning, match="71 records were not handed to it"):
        sinks.push(record(MAX_WAITING + 70))
    sinks.close()
    with pytest.warns(GradwatchWarning, match="stopped at 4,094: FileExists.* went on at 4,166; 71 records missing"):
        health = read_run(tmp_path / "run").health
    assert health.num_missing == 71
