import csv
import json
import logging
import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from gradwatch.errors import ConfigError, GradwatchWarning, RunFormatError
from gradwatch.protocols import RunMeta, Sink
from gradwatch.records import Histogram, Incident
from gradwatch.sinks import SCALARS, CsvSink, DuckSink, MlflowSink, SafeSinks, WandbSink, sinks_for_loggers

from .made import record


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


# CSV


def test_csv_has_one_row_a_log_step_and_always_the_same_columns(tmp_path):
    sink = CsvSink(tmp_path / "deep" / "log.csv")
    sink.open(RunMeta())
    window = [record(0, norm=7.0), record(1, loss=np.nan, time=5.0)]
    sink.write(window[-1], window)
    sink.write(record(2, has_loss=False, columns={}, masks={}, lr=np.inf))
    first, second = rows(tmp_path / "deep" / "log.csv")
    assert list(first) == ["step", "time", "lr", *SCALARS]
    assert first["step"] == "1"
    assert (first["global_norm"], first["global_norm_max"], first["loss"]) == ("1.0", "7.0", "nan")
    assert (second["loss"], second["largest_layer"], second["lr"]) == ("", "", "inf")


def test_resumed_csv_goes_on_where_the_run_does(tmp_path):
    path = tmp_path / "log.csv"
    for steps in (range(6), range(4, 8)):
        sink = CsvSink(path)
        sink.open(RunMeta())
        for step in steps:
            sink.write(record(step))
        sink.close()
    assert [r["step"] for r in rows(path)] == [str(s) for s in range(8)]


def test_csv_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RunFormatError, match=r"has columns of its own: a, b, \.\.\. Give another path"):
        CsvSink(tmp_path / "log.csv").open(RunMeta())
    assert (tmp_path / "log.csv").read_text() == "a,b\n1,2\n"


# Loggers by what they can do


class Metrics:
    def __init__(self):
        self.calls = []

    def log_metrics(self, metrics, step):
        self.calls.append((metrics, step))


class Metric:
    def __init__(self):
        self.calls = []

    def log_metric(self, name, value, step):
        self.calls.append((name, value, step))


def test_logger_of_metrics_gets_the_headline_in_one_call():
    logger = Metrics()
    sink = DuckSink(logger)
    sink.open(RunMeta())
    sink.write(record(3))
    sink.flush()
    ((values, step),) = logger.calls
    assert step == 3
    assert values["gradwatch/global_norm"] == 1.0
    assert len(values) <= 12
    assert all(type(v) is float for v in values.values())


def test_logger_of_single_metrics_gets_them_one_by_one():
    logger = Metric()
    DuckSink(logger, name="").write(record(3))
    assert ("global_norm", 1.0, 3) in logger.calls


class Tracks:
    """As a run of Aim takes numbers."""

    def __init__(self):
        self.calls = []

    def track(self, value, name=None, step=None, epoch=None, *, context=None):
        self.calls.append((name, value, step))


class Logs:
    """As a run of Trackio, and its module, take numbers."""

    def __init__(self):
        self.calls = []

    def log(self, metrics, step=None):
        self.calls.append((metrics, step))


def test_what_tracks_or_logs_with_a_step_is_a_logger():
    tracks, logs = Tracks(), Logs()
    sinks = sinks_for_loggers([tracks, logs])
    for sink in sinks:
        sink.write(record(3))
    assert ("gradwatch/global_norm", 1.0, 3) in tracks.calls
    ((values, step),) = logs.calls
    assert (values["gradwatch/global_norm"], step) == (1.0, 3)


def test_what_logs_sentences_is_no_logger_of_numbers():
    for logger in (logging.getLogger("gradwatch.tests"), math, print):
        with pytest.raises(ConfigError, match="it is no logger"):
            DuckSink(logger)


# A caller's own numbers, logged without a step, beside ours at every fiftieth.
REAL = textwrap.dedent("""
    import json, sqlite3, sys
    from pathlib import Path
    from gradwatch.protocols import RunMeta
    from gradwatch.sinks import SafeSinks, sinks_for_loggers
    from tests.sinks.made import record
    {begin}
    sinks = SafeSinks(sinks_for_loggers([{given}]), on_error="raise", log_every=50)
    assert [type(s).__name__ for s in sinks.sinks] == ["{sink}"]
    sinks.open(RunMeta())
    for step in range(150):
        sinks.push(record(step, norm=float("nan") if step == 99 else 4.0))
        if step % 30 == 0:
            {own}
    sinks.close()
    found = {{}}
    {end}
    print(json.dumps(found))
""")
AIM = {
    "given": "run",
    "sink": "DuckSink",
    "begin": "import aim; run = aim.Run(repo=sys.argv[1], system_tracking_interval=None, log_system_params=False)",
    "own": "run.track(float(step), name='loss')",
    "end": """
for metric in run.metrics():
    steps, (values, *_) = metric.data.items_list()
    found[metric.name] = dict(zip(steps, values))
run.close()
""",
}
TRACKIO = {
    "sink": "TrackioSink",
    "begin": "import trackio; run = trackio.init(project='p', embed=False, auto_log_cpu=False)",
    "own": "trackio.log({'loss': float(step)})",
    "end": """
trackio.finish()
(store,) = Path(sys.argv[1]).glob("*.db")
for step, metrics in sqlite3.connect(store).execute("select step, metrics from metrics order by id"):
    for name, value in json.loads(metrics).items():
        found.setdefault(name, {})[step] = float(value)
""",
}


def store_of(parts, folder, **more):
    """Run a training of 150 steps with another's run in a process of its own: what its store then holds."""
    done = subprocess.run(
        [sys.executable, "-c", REAL.format(**{**parts, **more}), str(folder)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_both_are_kept(found):
    norms = {int(step): value for step, value in found["gradwatch/global_norm"].items()}
    assert norms == {49: 4.0, 99: pytest.approx(float("nan"), nan_ok=True), 149: 4.0}
    # As it would be without us.
    assert found["loss"] == {str(i): 30.0 * i for i in range(5)}


@pytest.mark.slow
def test_real_run_of_aim_takes_ours_beside_the_callers_own(tmp_path):
    pytest.importorskip("aim")
    assert_both_are_kept(store_of(AIM, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("given", ["run", "trackio"])
def test_real_run_of_trackio_takes_ours_beside_the_callers_own(given, tmp_path):
    pytest.importorskip("trackio")
    assert_both_are_kept(store_of(TRACKIO, tmp_path, given=given))


def test_fixed_keys_never_change():
    logger = Metrics()
    sink = DuckSink(logger, fixed_keys=True)
    sink.write(record(0, columns={}, has_loss=False))
    sink.write(record(1))
    (first, _), (second, _) = logger.calls
    assert list(first) == list(second) == [f"gradwatch/{key}" for key in SCALARS]
    assert np.isnan(first["gradwatch/loss"])


# Weights & Biases


class WandbRun:
    def __init__(self):
        self.logged, self.alerts, self.artifacts = [], [], []

    def log(self, data):
        self.logged.append(data)

    def alert(self, title, text, level):
        self.alerts.append((title, text, level))

    def log_artifact(self, path, name, type):  # noqa: A002
        self.artifacts.append((path, name, type))


@pytest.mark.slow
def test_wandb_gets_histograms_from_our_own_bins():
    pytest.importorskip("wandb")
    run = WandbRun()
    counts = np.zeros(512, np.int64)
    counts[[100, 103]] = 5, 7
    WandbSink(run).write(record(1), [record(0, histograms={"blocks.0.weight": Histogram(counts)})])
    histograms, _ = run.logged
    assert histograms["trainer/global_step"] == 0
    made = histograms["gradwatch/histograms/blocks.0.weight"]
    assert made.histogram == [5, 0, 0, 7]
    np.testing.assert_allclose([made.bins[0], made.bins[-1]], [-27 * np.log10(2), -23 * np.log10(2)])


def test_wandb_gets_scalars_alerts_and_the_report(tmp_path):
    run = WandbRun()
    sink = WandbSink(run, name="my watch")
    sink.open(RunMeta())
    sink.write(record(1), [record(0)])
    for last in (1, 2):
        sink.incident(Incident(rule="dead", first_step=1, last_step=last, advice="Look."))
    sink.incident(Incident(rule="drift", first_step=1, last_step=1, severity="info"))
    sink.report(tmp_path / "report.html")
    (scalars,) = run.logged
    assert scalars["trainer/global_step"] == 1
    assert scalars["my watch/global_norm"] == 1.0
    ((title, text, level),) = run.alerts
    assert (title, level) == ("dead", "WARN")
    assert text.endswith("Look.")
    assert run.artifacts == [(str(tmp_path / "report.html"), "my-watch-report", "report")]


WANDB = textwrap.dedent("""
    import sys, json, wandb, numpy as np
    from gradwatch.protocols import RunMeta
    from gradwatch.records import Histogram, Incident
    from gradwatch.sinks import SafeSinks, sinks_for_loggers
    from tests.sinks.made import record
    run = wandb.init(mode="offline", dir=sys.argv[1], project="p", settings=wandb.Settings(silent=True))
    sinks = SafeSinks(sinks_for_loggers([run]), on_error="raise", log_every=1)
    assert [type(s).__name__ for s in sinks.sinks] == ["WandbSink"]
    sinks.open(RunMeta())
    sinks.push(record(0, histograms={"blocks.0.weight": Histogram(np.arange(512))}))
    sinks.incident(Incident(rule="dead", first_step=1, last_step=1))
    sinks.push(record(1, norm=4.0))
    sinks.close()
    print(json.dumps({k: v for k, v in dict(run.summary).items() if isinstance(v, (int, float))}))
    run.finish()
""")


@pytest.mark.slow
def test_real_wandb_run_takes_it_offline(tmp_path):
    pytest.importorskip("wandb")
    done = subprocess.run([sys.executable, "-c", WANDB, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["gradwatch/global_norm"] == 4.0
    assert list(tmp_path.rglob("*.wandb"))


# MLflow


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_real_mlflow_run_takes_the_headline(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    try:
        client = mlflow.MlflowClient(tracking_uri=(tmp_path / "store").as_uri())
        experiment = client.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
    except Exception as error:
        pytest.skip(f"this mlflow has no local store: {error}")
    run_id = client.create_run(experiment).info.run_id
    sink = MlflowSink(client, run_id)
    sink.open(RunMeta())
    sink.write(record(0))
    sink.write(record(1, norm=4.0, loss=np.nan))
    (tmp_path / "report.html").write_text("x")
    sink.report(tmp_path / "report.html")
    history = client.get_metric_history(run_id, "gradwatch/global_norm")
    assert [(m.step, m.value) for m in history] == [(0, 1.0), (1, 4.0)]
    assert np.isnan(client.get_metric_history(run_id, "gradwatch/loss")[-1].value)
    assert [a.path for a in client.list_artifacts(run_id)] == ["report.html"]


# Choosing


class TensorBoardLogger:
    def __init__(self, path):
        self.experiment = SummaryWriter(str(path))


class MLFlowLogger:
    run_id = "r"

    class experiment:
        log_batch = log_artifact = print


class CSVLogger(Metrics):
    pass


class Mine(CSVLogger):
    pass


class NeptuneLogger(Metrics):
    @property
    def experiment(self):
        raise AssertionError("not needed")


class WandbLogger:
    @property
    def experiment(self):
        raise ModuleNotFoundError("No module named 'wandb'")


def test_loggers_are_chosen_by_class_name_several_at_once(tmp_path):
    loggers = [TensorBoardLogger(tmp_path), MLFlowLogger(), CSVLogger(), Mine(), NeptuneLogger(), Metric()]
    sinks = sinks_for_loggers(loggers, name="gw")
    assert [type(s).__name__ for s in sinks] == ["TensorBoardSink", "MlflowSink", *["DuckSink"] * 4]
    assert [s.fixed_keys for s in sinks[2:]] == [True, True, False, False]
    assert {s.name for s in sinks} == {"gw"}
    assert all(isinstance(s, Sink) for s in sinks)
    loggers[0].experiment.close()


def test_logger_that_is_missing_is_one_warning_and_the_others_are_used():
    with pytest.warns(
        GradwatchWarning, match=r"WandbLogger can't be written to: ModuleNotFoundError: No module"
    ) as caught:
        sinks = sinks_for_loggers([WandbLogger(), Metrics()])
    assert len(caught) == 1
    assert [type(s).__name__ for s in sinks] == ["DuckSink"]


def test_object_that_is_no_logger_is_named():
    with pytest.warns(GradwatchWarning, match="int is no logger that gradwatch knows"):
        assert sinks_for_loggers([3]) == []


def test_logger_that_fails_later_is_one_warning():
    class Breaking(Metrics):
        def log_metrics(self, metrics, step):
            raise ConnectionError("gone")

    sinks = SafeSinks(sinks_for_loggers([Breaking(), Metrics()]), log_every=1)
    with pytest.warns(GradwatchWarning, match="DuckSink failed while writing: ConnectionError: gone") as caught:
        sinks.push(record(0))
    sinks.push(record(1))
    assert len(caught) == 1
    assert len(sinks.sinks[0].logger.calls) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda: DuckSink(3),
            "int has none of `log_metrics`, `log_metric`, `track`, `log` that takes a `step`: it is no logger.",
            id="duck",
        ),
        pytest.param(
            lambda: WandbSink(3), "WandbSink needs a run with `log`, as wandb.init() returns. Got int.", id="wandb"
        ),
        pytest.param(
            lambda: WandbSink(WandbRun(), max_histograms=-1),
            "WandbSink: `max_histograms` must be at least 0. Got -1.",
            id="wandb-histograms",
        ),
        pytest.param(lambda: MlflowSink(3, "r"), "MlflowSink needs a client with `log_batch`. Got int.", id="mlflow"),
    ],
)
def test_what_can_not_be_written_to_is_refused(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message
