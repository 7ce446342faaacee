import gc
import subprocess
import sys
import threading
import weakref

import pytest

from gradwatch.errors import ConfigError, GradwatchWarning
from gradwatch.protocols import RunMeta, Sink
from gradwatch.records import Incident
from gradwatch.sinks import MemorySink, RunFolder, SafeSinks, _trouble
from gradwatch.sinks._lane import MAX_WAITING

from .made import record

CALLS = {
    "open": lambda s: s.open(RunMeta()),
    "write": lambda s: s.write(record(0)),
    "push": lambda s: s.push(record(0)),
    "incident": lambda s: s.incident(Incident(rule="dead", first_step=0, last_step=0)),
    "summary": lambda s: s.summary("words"),
    "flush": lambda s: s.flush(),
    "close": lambda s: s.close(),
}


DOING = {
    "open": "opening",
    "write": "writing",
    "incident": "writing an incident",
    "summary": "writing the summary",
    "flush": "flushing",
    "close": "closing",
}


def call_all(sinks, *names):
    for name in names:
        CALLS[name](sinks)


class Failing(MemorySink):
    """Raises in one method."""

    never_hangs = False

    def __init__(self, where):
        super().__init__()
        self.where, self.calls = where, 0

    def _maybe(self, name):
        self.calls += 1
        if name == self.where:
            raise OSError(28, "No space left on device")

    def open(self, meta):
        self._maybe("open")

    def write(self, record, window=()):
        self._maybe("write")

    def incident(self, incident):
        self._maybe("incident")

    def summary(self, text):
        self._maybe("summary")

    def flush(self):
        self._maybe("flush")

    def close(self):
        self._maybe("close")


@pytest.mark.parametrize(
    ("where", "missed"), [("open", 2), ("write", 2), ("incident", 1), ("summary", 1), ("flush", 0), ("close", 0)]
)
def test_sink_that_fails_is_one_warning_and_one_of_what_it_missed_and_the_others_go_on(where, missed, monkeypatch):
    monkeypatch.setattr(_trouble, "monotonic", lambda: 0.0)  # no pause ends
    bad, good = Failing(where), MemorySink()
    sinks = SafeSinks([bad, good], log_every=1)
    with pytest.warns(GradwatchWarning) as caught:
        call_all(sinks, "open", "push", "incident", "summary", "push", "flush", "close")
    full = "OSError: [Errno 28] No space left on device"
    assert f"Failing failed while {DOING[where]}: {full}. It " in str(caught[0].message)
    assert [str(w.message) for w in caught[1:]] == (
        [f"Failing failed to the end: {full}; {missed} records were not handed to it."] if missed else []
    )
    assert len(good.records) == 2
    assert (good.text, len(good.incidents), good.closed) == ("words", 1, True)
    assert sinks.sinks == (good,)
    assert list(sinks.failed) == ["Failing"]
    before = bad.calls
    sinks.push(record(9))
    assert bad.calls == before


@pytest.mark.parametrize("where", ["open", "write", "incident", "flush", "close"])
def test_errors_come_through_on_request(where):
    sinks = SafeSinks([Failing(where)], log_every=1, on_error="raise")
    with pytest.raises(OSError, match="No space left"):
        call_all(sinks, "open", "push", "incident", "flush", "close")


def test_interrupt_is_never_swallowed():
    class Interrupted(MemorySink):
        def write(self, record, window=()):
            raise KeyboardInterrupt

    sinks = SafeSinks([Interrupted()])
    with pytest.raises(KeyboardInterrupt):
        sinks.push(record(0))


class Slow(MemorySink):
    """Asks for no cadence of its own, and keeps the windows."""

    every = None

    def __init__(self):
        super().__init__()
        self.windows = []

    def write(self, record, window=()):
        assert window[-1] is record
        self.windows.append([r.step for r in window])


def test_each_sink_is_written_at_its_own_cadence_and_misses_no_record():
    slow, every = Slow(), MemorySink()
    sinks = SafeSinks([slow, every], log_every=4)
    sinks.open(RunMeta())
    for step in range(10):
        sinks.push(record(step))
    assert slow.windows == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert every.steps == list(range(10))
    sinks.close()
    assert slow.windows[-1] == [8, 9]


def test_window_that_began_between_two_log_steps_ends_at_the_next():
    slow = Slow()
    sinks = SafeSinks([slow], log_every=4)
    for step in (6, 7, 8, 20, 40, 60):
        sinks.push(record(step))
    assert slow.windows == [[6, 7], [8, 20, 40, 60]]


def test_sinks_may_be_closed_and_flushed_again():
    memory = MemorySink()
    sinks = SafeSinks([memory])
    sinks.open(RunMeta())
    sinks.push(record(0))
    for _ in range(2):
        sinks.close()
        sinks.flush()
    assert len(memory.records) == 1


def test_forgotten_sinks_can_be_collected():
    sinks = SafeSinks([MemorySink()])
    sinks.open(RunMeta())
    gone = weakref.ref(sinks)
    del sinks
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(([3],), "a sink has the methods open, write, incident, flush and close. Got 3.", id="no-sink"),
        pytest.param(([], 0), "SafeSinks: `log_every` must be at least 1. Got 0.", id="log-every"),
        pytest.param(
            ([], 1, "ignore"), "SafeSinks: `on_error` must be 'warn' or 'raise'. Got 'ignore'.", id="on-error"
        ),
    ],
)
def test_setting_that_can_not_be_is_refused(arguments, message):
    sinks, *rest = arguments
    with pytest.raises(ConfigError) as caught:
        SafeSinks(sinks, **dict(zip(("log_every", "on_error"), rest, strict=False)))
    assert str(caught.value) == message


def test_memory_keeps_the_newest_records_and_the_last_state_of_incidents():
    memory = MemorySink(max_records=2)
    memory.open(RunMeta(name="gw"))
    for step in range(3):
        memory.write(record(step))
    for last in (1, 2):
        memory.incident(Incident(rule="dead", first_step=1, last_step=last))
    assert memory.steps == [1, 2]
    assert [i.last_step for i in memory.incidents] == [2]
    assert memory.meta.name == "gw"
    with pytest.raises(ConfigError, match=r"`max_records` must be above 0 or None. Got 0\."):
        MemorySink(max_records=0)


@pytest.mark.parametrize("sink", [MemorySink(), RunFolder("x"), SafeSinks([])], ids=lambda s: type(s).__name__)
def test_it_is_a_sink(sink):
    assert isinstance(sink, Sink)


@pytest.mark.slow
def test_importing_sinks_and_runs_pulls_in_neither_torch_nor_tensorboard():
    program = "import sys, gradwatch.sinks, gradwatch.runs; print({'torch', 'tensorboard', 'wandb'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"


def test_annotations_and_reports_go_to_the_sinks_that_keep_them(tmp_path):
    class Keeper(MemorySink):
        def annotate(self, **annotation):
            self.told = annotation

        def report(self, path):
            self.kept = path

    keeper = Keeper()
    sinks = SafeSinks([MemorySink(), keeper])
    sinks.annotate(text="data switch", silence=5)
    sinks.report(tmp_path)
    assert keeper.told == {"text": "data switch", "silence": 5}
    assert keeper.kept == tmp_path


class Blocked(MemorySink):
    """Blocks in `write` until it is let go."""

    never_hangs = False

    def __init__(self):
        super().__init__()
        self.gate, self.threads = threading.Event(), set()

    def write(self, record, window=()):
        self.threads.add(threading.current_thread())
        self.gate.wait()
        super().write(record, window)


def push_all(sinks, count, *, incidents=False):
    for step in range(count):
        sinks.push(record(step))
        if incidents:
            sinks.incident(Incident(rule="dead", first_step=step, last_step=step))


def test_sink_that_blocks_holds_nobody_and_is_handed_everything_when_it_goes_on():
    blocked, other = Blocked(), MemorySink()
    sinks = SafeSinks([blocked, other], log_every=1)
    sinks.open(RunMeta())
    with pytest.warns(GradwatchWarning, match="Blocked takes its time while writing") as caught:
        push_all(sinks, 2000, incidents=True)
    assert len(caught) == 1
    assert (blocked.steps, other.steps) == ([], list(range(2000)))
    blocked.gate.set()
    sinks.close()
    assert blocked.steps == list(range(2000))
    assert len(blocked.incidents) == 2000
    assert blocked.closed
    assert threading.current_thread() not in blocked.threads


def test_what_does_not_fit_into_the_queue_of_a_sink_that_blocks_is_counted_and_told():
    blocked = Blocked()
    sinks = SafeSinks([blocked], log_every=1)
    sinks.open(RunMeta())
    with pytest.warns(GradwatchWarning, match="takes its time"):
        push_all(sinks, MAX_WAITING + 100)
    blocked.gate.set()
    with pytest.warns(GradwatchWarning, match="Blocked was too slow: 100 records were never handed to it, and 0 calls"):
        sinks.close()
    assert blocked.steps == list(range(MAX_WAITING))


def test_error_of_a_call_that_nobody_waited_for_is_told_and_the_sink_left_out():
    class Late(Blocked):
        def write(self, record, window=()):
            super().write(record, window)
            raise OSError("gone")

    late = Late()
    sinks = SafeSinks([late], log_every=1)
    with pytest.warns(GradwatchWarning, match="Late takes its time"):
        sinks.push(record(0))
    late.gate.set()
    with pytest.warns(GradwatchWarning, match="Late failed while writing: OSError: gone"):
        sinks.close()
    assert sinks.sinks == ()


def test_a_sinks_thread_ends_with_it():
    def threads():
        return [t for t in threading.enumerate() if t.name == "gradwatch-sink"]

    slow = Slow()
    slow.never_hangs = False
    before = threads()  # another test's may end meanwhile
    sinks = SafeSinks([slow], log_every=1)
    sinks.push(record(0))
    (mine,) = [thread for thread in threads() if thread not in before]
    sinks.close()
    mine.join(10)
    assert not mine.is_alive()
