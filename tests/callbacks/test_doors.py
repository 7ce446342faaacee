"""Factories, entry points, who is told of incidents, and what reaches the sinks."""

import copy
import json
import pickle
import threading
import warnings
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import entry_points
from pathlib import Path

import lightning.fabric
import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from gradwatch import ConfigError, GradwatchWarning, Watch
from gradwatch.callbacks import AutoClip, GradientSurgery, GradWatch, HistogramLogger
from gradwatch.callbacks._from_environment import trainer_callback
from gradwatch.callbacks.fabric import GradWatch as FabricGradWatch
from gradwatch.errors import UnknownNameError
from gradwatch.rules import Exploding, NonFinite
from gradwatch.runs import read_run, replay
from gradwatch.sinks import MemorySink

from . import told
from .loops import Batches, Job, LitNet, Net, adam

GROUPS = {
    "lightning.pytorch.callbacks_factory": lightning.pytorch.callbacks.Callback,
    "pytorch_lightning.callbacks_factory": pytorch_lightning.callbacks.Callback,
    "lightning.fabric.callbacks_factory": FabricGradWatch,
    "lightning_fabric.callbacks_factory": FabricGradWatch,
}


def made(group: str) -> list:
    (entry,) = (e for e in entry_points(group=group) if e.name == "gradwatch")
    return entry.load()()


def fit(tmp_path: Path, package, *callbacks, batches: int = 6, model=None, **options):
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    trainer = package.Trainer(callbacks=list(callbacks), **settings | options)
    data = Batches(batches, bad=(3,))
    trainer.fit(model or LitNet(), Job(tmp_path, data).loader())
    return trainer


@pytest.mark.parametrize("group", GROUPS)
def test_the_environment_alone_asks_for_a_callback_of_the_packages_own_kind(
    group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRADWATCH", raising=False)
    assert made(group) == []
    monkeypatch.setenv("GRADWATCH", "0")
    assert made(group) == []
    monkeypatch.setenv("GRADWATCH", "1")
    (callback,) = made(group)
    assert isinstance(callback, GROUPS[group])
    monkeypatch.setenv("GRADWATCH_RULES", "no-such-preset")
    with pytest.raises(ConfigError, match="no-such-preset"):
        made(group)


def test_a_script_is_watched_without_a_changed_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRADWATCH", "1")
    monkeypatch.setenv("GRADWATCH_RULES", "autoclip")
    trainer = fit(tmp_path, pytorch_lightning)
    (watch,) = (c for c in trainer.callbacks if isinstance(c, GradWatch))
    assert [r.step for r in watch.history if r.skipped] == [3]
    assert "non_finite" in capsys.readouterr().err


def test_a_fabric_script_is_watched_without_a_changed_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWATCH", "1")
    monkeypatch.setenv("GRADWATCH_RULES", "autoclip")
    fabric, inner = lightning.fabric.Fabric(accelerator="cpu"), Net()
    model, optimizer = fabric.setup(inner, adam(inner))
    for batch in Job(tmp_path, Batches(6, bad=(3,))).loader():
        fabric.backward(model(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    (watch,) = fabric._callbacks
    assert [r.step for r in watch.history if r.skipped] == [3]
    watch.close()  # as at the end of the process


def test_the_environments_callback_steps_back_where_the_script_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADWATCH", "1")
    mine = GradWatch(verbose=False, run_dir=False)
    trainer = fit(tmp_path, pytorch_lightning, mine)
    other = next(c for c in trainer.callbacks if isinstance(c, GradWatch) and c is not mine)
    assert len(mine.history) == 6
    assert other.history == []
    assert other.summary() == "gradwatch: no training has begun."


class OtherCallback:
    """Stands for the class of a second Lightning package, imported after gradwatch."""


@pytest.mark.parametrize("base", [pytorch_lightning.Callback, OtherCallback])
def test_the_environments_callback_goes_to_other_processes_whatever_its_base(base: type) -> None:
    watch = trainer_callback(base, "autoclip", run_dir=False)
    for twin in (pickle.loads(pickle.dumps(watch)), copy.deepcopy(watch)):
        assert type(twin) is type(watch)
        assert isinstance(twin, base)
        assert isinstance(twin, GradWatch)
        assert [rule.name for rule in twin.settings.book] == [rule.name for rule in watch.settings.book]


@pytest.mark.parametrize("hand_over", [list, copy.deepcopy, lambda x: x], ids=["list", "deepcopy", "same"])
def test_a_list_of_callbacks_given_to_two_trainers_is_watched_once_by_each(
    hand_over: Callable[[list], list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADWATCH", "1")
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    callbacks = [pytorch_lightning.Callback()]
    for number in range(3):
        # Lightning appends the environment's callback to the list itself.
        callbacks = hand_over(callbacks)
        trainer = pytorch_lightning.Trainer(callbacks=callbacks, default_root_dir=tmp_path / str(number), **settings)
        trainer.fit(LitNet(), Job(tmp_path, Batches(6)).loader())
        ours = [c for c in trainer.callbacks if isinstance(c, GradWatch)]
        assert [len(c.history) for c in ours] == [0] * (len(ours) - 1) + [6]
        saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["callbacks"]
        assert [key for key in saved if "gradwatch" in key] == ["gradwatch:gradwatch:environment"]
    assert len(ours) == 3


def test_the_norm_is_in_the_bar_and_not_among_the_scripts_metrics(tmp_path: Path) -> None:
    class Bar(pytorch_lightning.callbacks.ProgressBar):
        shown: list = []

        def disable(self) -> None: ...

        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            self.shown.append(self.get_metrics(trainer, pl_module))

    bar, mine = Bar(), GradWatch(verbose=False, run_dir=False)
    trainer = fit(tmp_path, pytorch_lightning, mine, bar, log_every_n_steps=1, enable_progress_bar=True)
    norms = [m["gradwatch/norm"] for m in bar.shown if "gradwatch/norm" in m]
    assert norms[:3] == [r.global_norm for r in mine.history[:3]]
    assert "gradwatch/norm" not in {**trainer.callback_metrics, **trainer.progress_bar_metrics}
    assert "get_metrics" not in vars(bar)
    assert "gradwatch/norm" not in bar.get_metrics(trainer, trainer.lightning_module)


def test_a_second_fit_of_a_trainer_is_in_its_tensorboard_too(tmp_path: Path) -> None:
    logger = pytorch_lightning.loggers.TensorBoardLogger(tmp_path)
    mine = GradWatch(verbose=False, run_dir=False, log_every=1, on_error="raise")
    trainer = fit(tmp_path, pytorch_lightning, mine, logger=logger)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, Job(tmp_path, Batches(6)).loader())
    accumulator = EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in accumulator.Scalars("gradwatch/global_norm")] == list(range(12))


def test_factories_give_callbacks_that_work_side_by_side(tmp_path: Path) -> None:
    clip, logger = AutoClip(verbose=False, run_dir=False), HistogramLogger(2, paths="head.*", scale="signed")
    fit(tmp_path, pytorch_lightning, clip, logger)
    assert [r.step for r in clip.history if r.skipped] == [3]
    assert [bool(r.histograms) for r in logger.history] == [True, True, True, False, True, False]
    assert set(logger.history[0].histograms) == {"head.weight", "head.bias"}
    assert logger.incidents == []


@pytest.mark.parametrize("method", ["zclip", "quantile", "norm"])
def test_autoclip_clips_by_the_method_it_names_and_skips_what_is_not_finite(tmp_path: Path, method: str) -> None:
    watch = AutoClip(method, max_norm=0.1 if method == "norm" else None, verbose=False, run_dir=False)
    model = LitNet()
    fit(tmp_path, pytorch_lightning, watch, model=model)
    assert [r.step for r in watch.history if r.skipped] == [3]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if method == "norm":
        assert all(r.global_norm_after <= 0.1 * (1 + 1e-5) for r in watch.history if not r.skipped)


def test_gradient_surgery_sets_the_method() -> None:
    watch = GradientSurgery("cagrad", when="always", verbose=False)
    assert watch.settings.surgery is not None
    assert watch.state_key == "gradwatch:surgery"


def test_autoclip_refuses_what_does_not_fit_together() -> None:
    with pytest.raises(ConfigError) as info:
        AutoClip("zclip", max_norm=1.0)
    assert str(info.value) == "AutoClip: `max_norm` belongs to the method 'norm'. Got 'zclip' and max_norm=1.0."
    with pytest.raises(UnknownNameError, match="zclip"):
        AutoClip("zlip")


def bad_run(on_incident, **options) -> Watch:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    watch = Watch(
        model, torch.optim.SGD(model.parameters(), 0.1), rules=[NonFinite()], on_incident=on_incident, **options
    )
    with watch:
        for i in range(4):
            loss = model(torch.full((4, 3), float("nan") if i == 2 else 1.0)).sum()
            loss.backward()
            watch.step(loss=loss.detach())
            watch.optimizers[0].zero_grad()
            for p in model.parameters():
                torch.nan_to_num_(p.data)
    return watch


def test_incidents_are_told_in_another_thread_when_they_open() -> None:
    heard = []
    bad_run(lambda incident: heard.append((incident.rule, threading.current_thread().name)))
    assert ("non_finite", "gradwatch-notify") in heard


def test_a_function_can_be_named_in_words() -> None:
    told.HEARD.clear()
    bad_run("tests.callbacks.told:hear")
    assert {i.rule for i in told.HEARD} == {"non_finite"}


def test_a_webhook_gets_the_incident_as_json() -> None:
    posted = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        bad_run(f"http://127.0.0.1:{server.server_port}/hook")
        server.shutdown()
    assert [p["rule"] for p in posted] == ["non_finite"]


def test_a_target_that_raises_is_one_warning_and_the_training_goes_on() -> None:
    def fails(incident):
        raise RuntimeError("no line")

    with pytest.warns(GradwatchWarning, match="of incidents failed once: RuntimeError"):
        bad_run(fails)


@pytest.mark.parametrize(
    "door",
    [
        lambda t: Watch(m := nn.Linear(1, 1), torch.optim.SGD(m.parameters()), on_incident=t),
        lambda t: GradWatch(on_incident=t),
    ],
)
def test_a_target_that_can_not_be_is_refused_at_the_door(door) -> None:
    with pytest.raises(ConfigError) as info:
        door("nowhere")
    assert str(info.value) == (
        "gradwatch: `on_incident` must be a callable, an http(s) address or 'module:function'. Got 'nowhere'."
    )


class Keeps(MemorySink):
    def __init__(self) -> None:
        super().__init__()
        self.notes, self.reports = [], []

    def annotate(self, **annotation):
        self.notes.append(annotation)

    def report(self, path):
        self.reports.append(Path(path))


def spiked(tmp_path: Path, *, note: bool, sink: Keeps) -> Watch:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-12)
    with Watch(model, optimizer, rules=[Exploding()], run_dir=tmp_path / f"run{note}", sinks=[sink]) as watch:
        for i in range(60):
            if i == 50 and note:
                watch.annotate("new data", silence=5)
            x = torch.randn(8, 4) * (1000 if i == 52 else 1)
            model(x).square().mean().backward()
            watch.step()
            optimizer.zero_grad()
        watch.report(tmp_path / "report.html")
    return watch


@pytest.mark.parametrize("note", [False, True])
def test_annotations_and_reports_reach_the_sinks_and_a_replay_keeps_as_still(tmp_path: Path, note: bool) -> None:
    sink = Keeps()
    watch = spiked(tmp_path, note=note, sink=sink)
    assert [n["text"] for n in sink.notes] == (["new data"] if note else [])
    assert sink.reports == [tmp_path / "report.html"]
    assert bool(watch.incidents) != note
    run = read_run(tmp_path / f"run{note}")
    assert replay(run, [Exploding()]).differences(watch.incidents) == []


def test_the_smallest_limit_of_the_rules_stands_on_the_record(tmp_path: Path) -> None:
    watch = spiked(tmp_path, note=False, sink=Keeps())
    limits = [r.scalars.get("limit") for r in watch.history]
    assert limits[:20] == [None] * 20
    # As it was when a stretch of sixteen steps began: none before the second at which a rule has one.
    assert all(limit > r.global_norm for limit, r in zip(limits[32:52], watch.history[32:52], strict=True))
    assert limits[52] < watch.history[52].global_norm
    steps, values = read_run(tmp_path / "runFalse").scalar("limit")
    assert values.tolist() == pytest.approx([x for x in limits if x is not None])
    assert len(steps) == len(values)


def test_two_watches_close_without_a_warning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bad_run(None).close()
    assert not [str(w.message) for w in caught]
