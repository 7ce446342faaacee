"""What happens to sinks in processes of their own: full disks, killed trainers, long runs, real loggers."""

import csv
import re
import signal
import subprocess
import sys
import textwrap

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradwatch.runs import read_log, read_run

pytestmark = pytest.mark.slow


def run_child(program, *arguments, check=True):
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def scalars(path, tag):
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    return [e.step for e in events.Scalars(tag)]


def test_full_disk_under_tensorboard_is_told_with_what_it_missed_and_the_training_ends(tmp_path):
    done = run_child(
        """
        import resource, signal, sys, time, warnings
        from torch.utils.tensorboard import SummaryWriter
        from gradwatch.protocols import RunMeta
        from gradwatch.sinks import MemorySink, SafeSinks, TensorBoardSink
        from tests.sinks.made import mixed_index, record
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writer = SummaryWriter(sys.argv[1], flush_secs=0)
        memory = MemorySink()
        sinks = SafeSinks([TensorBoardSink(writer), memory], log_every=1)
        sinks.open(RunMeta())
        index = mixed_index(200, 0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for t in range(100):
                if t == 50:
                    sinks.flush()
                    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
                sinks.push(record(t, index))
                time.sleep(0.002)
            sinks.close()
        assert len(memory.records) == 100
        assert memory.closed
        ours = [w for w in caught if w.category.__name__ == "GradwatchWarning"]
        print(len(ours), *(w.message for w in ours), sep="|")
        import os
        os._exit(0)  # torch's own writer raises when the interpreter closes it
        """,
        tmp_path,
    )
    count, first, last = done.stdout.strip().split("|")
    assert count == "2"
    assert first.startswith(
        "TensorBoardSink failed while writing: OSError: [Errno 27] File too large. It is tried again"
    )
    missed = re.fullmatch(r"TensorBoardSink failed to the end: .*; (\d+) records were not handed to it\.", last)
    assert missed is not None, last
    assert 0 < int(missed[1]) <= 50  # what the writer's own thread had taken before it died counts as handed over
    assert scalars(tmp_path, "gradwatch/global_norm")[:50] == list(range(50))


def test_sigkill_leaves_event_file_and_run_folder_readable_up_to_the_last_flush(tmp_path):
    done = run_child(
        """
        import os, signal, sys
        from torch.utils.tensorboard import SummaryWriter
        from gradwatch.protocols import RunMeta
        from gradwatch.records import Incident
        from gradwatch.sinks import RunFolder, SafeSinks, TensorBoardSink
        from tests.sinks.made import record
        writer = SummaryWriter(sys.argv[1])
        sinks = SafeSinks([RunFolder(sys.argv[1] + "/gradwatch"), TensorBoardSink(writer)], log_every=5)
        sinks.open(RunMeta())
        for t in range(40):
            sinks.push(record(t))
            if t == 34:
                sinks.incident(Incident(rule="dead", first_step=34, last_step=34))
                sinks.flush()
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert scalars(tmp_path, "gradwatch/global_norm")[:7] == [4, 9, 14, 19, 24, 29, 34]
    run = read_run(tmp_path / "gradwatch")
    assert run.steps().tolist()[:35] == list(range(35))
    assert [i.rule for i in run.incidents] == ["dead"]
    assert len(read_log(tmp_path)) >= 7


def test_interpreter_that_ends_without_close_leaves_every_event(tmp_path):
    run_child(
        """
        import sys
        from torch.utils.tensorboard import SummaryWriter
        from gradwatch.protocols import RunMeta
        from gradwatch.sinks import SafeSinks, TensorBoardSink
        from tests.sinks.made import record
        writer = SummaryWriter(sys.argv[1], max_queue=100)
        sinks = SafeSinks([TensorBoardSink(writer)], log_every=5)
        sinks.open(RunMeta())
        for t in range(13):
            sinks.push(record(t))
        """,
        tmp_path,
    )
    assert scalars(tmp_path, "gradwatch/global_norm") == [4, 9, 12]


def test_long_run_keeps_memory_flat_and_files_as_planned(tmp_path):
    done = run_child(
        """
        import resource, sys
        import numpy as np
        from torch.utils.tensorboard import SummaryWriter
        from gradwatch.protocols import RunMeta
        from gradwatch.records import Incident
        from gradwatch.sinks import RunFolder, SafeSinks, TensorBoardSink
        from tests.sinks.made import mixed_index, record
        writer = SummaryWriter(sys.argv[1] + "/tb")
        sinks = SafeSinks([RunFolder(sys.argv[1] + "/run"), TensorBoardSink(writer)], log_every=100)
        sinks.open(RunMeta())
        index = mixed_index(40, 10)
        for t in range(10_000):
            sinks.push(record(t, index, norm=1.0 + t % 7))
            if t % 10 == 0:
                sinks.incident(Incident(rule="dead", first_step=0, last_step=t, count=t + 1))
            if t == 2_000:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        sinks.close()
        writer.close()
        """,
        tmp_path,
    )
    assert int(done.stdout) < 20_000  # kB
    size = sum(p.stat().st_size for p in (tmp_path / "run").iterdir())
    assert size < 10_000 * (4 * 40 + 110)
    assert sum(p.stat().st_size for p in (tmp_path / "tb").glob("*tfevents*")) < 400_000
    assert len(read_run(tmp_path / "run")) == 10_000


def test_real_loggers_of_lightning_are_written_through(tmp_path):
    run_child(
        """
        import sys, warnings
        from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
        from gradwatch.protocols import RunMeta
        from gradwatch.sinks import SafeSinks, sinks_for_loggers
        from tests.sinks.made import record
        loggers = [TensorBoardLogger(sys.argv[1], name="tb"), CSVLogger(sys.argv[1], name="csv")]
        sinks = SafeSinks(sinks_for_loggers(loggers), log_every=2, on_error="raise")
        assert [type(s).__name__ for s in sinks.sinks] == ["TensorBoardSink", "DuckSink"]
        sinks.open(RunMeta())
        for t in range(6):
            sinks.push(record(t))
        sinks.close()
        for logger in loggers:
            logger.finalize("success")
        """,
        tmp_path,
    )
    assert scalars(tmp_path / "tb" / "version_0", "gradwatch/global_norm") == [1, 3, 5]
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        assert [r["gradwatch/global_norm"] for r in csv.DictReader(file)] == ["1.0"] * 3
