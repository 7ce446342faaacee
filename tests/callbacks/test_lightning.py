"""The Lightning callback, under the real Trainer."""

import copy
import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwatch import GradwatchWarning
from gradwatch.callbacks import GradWatch
from gradwatch.errors import TrainingStopped
from gradwatch.rules import Expression, NonFinite
from gradwatch.runs import read_run
from gradwatch.stats import Statistic
from gradwatch.treatments import Checkpoint, LowerLearningRate, Stop

EVERYTHING = {"activations_every": 1, "updates_every": 1, "histograms_every": 1, "log_every": 1}


class Net(pl.LightningModule):
    def __init__(self, optimizer: str = "adamw", bad: tuple[int, ...] = (), fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(inplace=True), nn.Linear(32, 1))
        self.optimizer, self.bad, self.fused = optimizer, bad, fused
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.body(x) - y).square().mean()
        if batch_idx in self.bad:
            loss = loss * math.nan
        self.losses.append(float(loss.detach()))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", (self.body(x) - y).square().mean())

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        if self.optimizer == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)
        return torch.optim.AdamW(self.parameters(), lr=2e-3, fused=self.fused)


def loader(batches: int = 12, size: int = 16) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches * size, 10, generator=generator)
    return DataLoader(TensorDataset(x, torch.sin(x.sum(1, keepdim=True))), batch_size=size)


def trainer(tmp_path: Path, *callbacks: pl.Callback, **options) -> pl.Trainer:
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **options})


def quiet(**options) -> GradWatch:
    return GradWatch(**{"verbose": False, "on_error": "raise", **options})


class Reference(pl.Callback):
    """Norms in float64 at the same place, by its own arithmetic."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.norms = scale, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = {n: p.grad.double() / self.scale for n, p in pl_module.named_parameters() if p.grad is not None}
        self.norms.append({n: float(g.norm()) for n, g in grads.items()})


def everything(model: pl.LightningModule, run: pl.Trainer) -> list[torch.Tensor]:
    states = [
        v
        for o in run.optimizers
        for s in o.state_dict()["state"].values()
        for v in s.values()
        if isinstance(v, torch.Tensor)
    ]
    return [*model.parameters(), *model.buffers(), *states, torch.get_rng_state(), torch.tensor(model.losses)]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="fp32"),
        pytest.param({"accumulate_grad_batches": 4}, id="accumulation"),
        pytest.param({"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param({"gradient_clip_val": 0.1}, id="trainers-clip"),
        pytest.param({"detect_anomaly": True}, id="detect-anomaly"),
    ],
)
def test_observing_is_bitwise_neutral_and_norms_are_right(tmp_path: Path, options: dict) -> None:
    def fit(*callbacks):
        model = Net()
        run = trainer(tmp_path, *callbacks, **options)
        torch.manual_seed(5)
        run.fit(model, loader())
        return everything(model, run)

    watch, reference = quiet(rules="observe", run_dir=False, **EVERYTHING), Reference()
    bare, watched = fit(), fit(watch, reference)
    assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))
    assert len(watch.history) == len(reference.norms)
    for record, norms in zip(watch.history, reference.norms, strict=True):
        for path, norm in norms.items():
            assert record["grad_norm", path] == pytest.approx(norm, rel=1e-5)
        assert record.global_norm == pytest.approx(math.sqrt(sum(v * v for v in norms.values())), rel=1e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_norms_are_unscaled_under_a_grad_scaler(tmp_path: Path, fused: bool) -> None:
    def fit(*callbacks):
        model = Net(fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        run = trainer(tmp_path, *callbacks, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
        run.fit(model, loader())
        return everything(model, run)

    watch, reference = quiet(run_dir=False, **EVERYTHING), Reference(scale=65536.0 if fused else 1.0)
    bare, watched = fit(), fit(watch, reference)
    assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))
    for record, norms in zip(watch.history, reference.norms, strict=True):
        for path, norm in norms.items():
            assert record["grad_norm", path] == pytest.approx(norm, rel=1e-5)


def test_loss_on_record_is_the_mean_over_micro_batches(tmp_path: Path) -> None:
    model, watch = Net(), quiet(run_dir=False)
    trainer(tmp_path, watch, accumulate_grad_batches=4).fit(model, loader())
    expected = [sum(model.losses[i : i + 4]) / 4 for i in (0, 4, 8)]
    assert [r.loss for r in watch.history] == pytest.approx(expected, rel=1e-6)
    assert [r.num_samples for r in watch.history] == [64, 64, 64]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_nan_batch_is_skipped_as_in_a_loop_that_drops_the_step(tmp_path: Path, accumulate: int) -> None:
    model, watch = Net("sgd", bad=(4,)), quiet(rules="autoclip", run_dir=False)
    run = trainer(tmp_path, watch, accumulate_grad_batches=accumulate)
    run.fit(model, loader())
    twin = Net("sgd")
    optimizer = twin.configure_optimizers()
    kept = copy.deepcopy(list(twin.buffers()))
    steps = 0
    for i, (x, y) in enumerate(loader()):
        if i % accumulate == 0:
            optimizer.zero_grad()
            kept = copy.deepcopy(list(twin.buffers()))
        ((twin.body(x) - y).square().mean() * (math.nan if i == 4 else 1) / accumulate).backward()
        if (i + 1) % accumulate == 0:
            if i // accumulate == 4 // accumulate:
                optimizer.zero_grad()
                with torch.no_grad():
                    for buffer, copy_ in zip(twin.buffers(), kept, strict=True):
                        buffer.copy_(copy_)
            optimizer.step()
            steps += 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert run.global_step == steps
    assert [r.skipped for r in watch.history].count(True) == 1
    (incident,) = watch.incidents
    assert (incident.rule, incident.treatments) == ("non_finite", ("skip_step",))


def test_nothing_is_left_on_the_model_after_a_fit_an_exception_or_ctrl_c(tmp_path: Path) -> None:
    class Interrupts(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                raise self.error

    for error in (None, RuntimeError("mine"), KeyboardInterrupt()):
        model, watch, stop = Net(), quiet(**EVERYTHING, run_dir=False), Interrupts()
        stop.error = error
        twin = Net()
        trainer(tmp_path).fit(twin, loader())
        run = trainer(tmp_path, watch, *([stop] if error else []))
        if error is None:
            run.fit(model, loader())
        else:
            with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
                run.fit(model, loader())
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
        assert not any(p._backward_hooks for p in model.parameters())
        assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in run.optimizers)
        assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in twin.modules()]
        assert len(watch.history) in (3, 12)


def test_resume_continues_windows_counters_and_steps(tmp_path: Path) -> None:
    def fit(epochs: int, checkpoint: str | None = None):
        model, watch = Net(bad=(7,)), quiet(rules="autoclip", run_dir=False)
        run = trainer(tmp_path, watch, max_epochs=epochs, enable_checkpointing=False)
        run.fit(model, loader(), ckpt_path=checkpoint)
        return run, watch

    run, _ = fit(2)
    path = tmp_path / "half.ckpt"
    run.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["callbacks"]["gradwatch:gradwatch"]
    _, resumed = fit(4, str(path))
    _, whole = fit(4)
    assert resumed._session.engine.completion.num_skipped == whole._session.engine.completion.num_skipped == 4
    facts = [[(i.rule, i.first_step, i.last_step, i.count) for i in w.incidents] for w in (resumed, whole)]
    assert facts[0] == facts[1]
    assert [str(r.global_norm) for r in resumed.history] == [str(r.global_norm) for r in whole.history[24:]]


def test_two_callbacks_work_side_by_side(tmp_path: Path) -> None:
    first, second = quiet(run_dir=False, name="one"), quiet(run_dir=False, name="two", rules="observe")
    trainer(tmp_path, first, second).fit(Net(), loader())
    assert [r.global_norm for r in first.history] == [r.global_norm for r in second.history]


def test_lbfgs_makes_one_record_a_step(tmp_path: Path) -> None:
    watch = quiet(run_dir=False)
    run = trainer(tmp_path, watch)
    run.fit(Net("lbfgs"), loader(3))
    assert [r.step for r in watch.history] == list(range(run.global_step))


class Gan(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.maker, self.judge = nn.Linear(4, 10), nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        real, _ = batch
        for optimizer, sign in zip(self.optimizers(), (1.0, -1.0), strict=True):
            self.toggle_optimizer(optimizer)
            fake = self.maker(torch.randn(len(real), 4))
            loss = sign * self.judge(fake).mean() + (self.judge(real).mean() if sign < 0 else 0.0)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return torch.optim.Adam(self.maker.parameters(), 1e-3), torch.optim.Adam(self.judge.parameters(), 1e-3)


def test_optimizers_that_step_in_turns_are_measured_each_on_its_own(tmp_path: Path) -> None:
    watch = quiet(run_dir=False)
    trainer(tmp_path, watch).fit(Gan(), loader(6))
    assert [r.scalars["optimizer"] for r in watch.history] == [0.0, 1.0] * 6
    assert [r.step for r in watch.history] == list(range(12))
    makers = [r.measured("grad_norm")[r.index.position("maker.weight")] for r in watch.history]
    assert makers == [True, False] * 6
    assert watch.incidents == []


def test_ten_bad_steps_stop_the_fit_with_an_error(tmp_path: Path) -> None:
    model, watch = Net(bad=tuple(range(2, 40))), quiet(rules="autoclip", run_dir=False)
    with pytest.raises(TrainingStopped, match="10 optimizer steps in a row"):
        trainer(tmp_path, watch).fit(model, loader(40))
    assert len(watch.history) == 12
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_actions_reach_the_trainer(tmp_path: Path) -> None:
    rules = [NonFinite(then=[LowerLearningRate(0.5, steps=3), Checkpoint(), Stop()])]
    watch = quiet(rules=rules, run_dir=tmp_path / "run")
    model = Net(bad=(3,))
    run = trainer(tmp_path, watch, max_epochs=5)
    run.fit(model, loader())
    assert run.should_stop
    assert run.global_step < 60
    assert list((tmp_path / "run").glob("*.ckpt"))
    assert watch.incidents[0].rule == "non_finite"


def test_validation_metrics_reach_the_record_after(tmp_path: Path) -> None:
    watch = quiet(run_dir=False)
    run = trainer(tmp_path, watch, max_epochs=2)
    run.fit(Net(), loader(), loader(2))
    assert "val_loss" not in watch.history[11].scalars
    assert watch.history[12].scalars["val_loss"] > 0


def test_tensorboard_and_a_run_folder_are_written_by_default(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from gradwatch.runs import read_run

    watch = GradWatch(verbose=False, log_every=3, histograms_every=4)
    run = trainer(tmp_path, watch, logger=TensorBoardLogger(tmp_path, name="tb"), max_epochs=3)
    run.fit(Net(), loader())
    events = EventAccumulator(run.logger.log_dir, size_guidance={"tensors": 0, "scalars": 0, "histograms": 0}).Reload()
    tags = events.Tags()
    assert "gradwatch/global_norm" in tags["scalars"]
    assert len([t for t in tags["scalars"] if t.startswith("gradwatch/")]) <= 12
    assert "gradwatch/grad_norm" in tags["tensors"]
    assert any("body.0.weight" in t for t in tags["histograms"])
    logged = {e.step: e.value for e in events.Scalars("gradwatch/global_norm")}
    for record in watch.history:
        if record.step in logged:
            assert logged[record.step] == pytest.approx(record.global_norm, rel=1e-6)
    saved = read_run(Path(run.logger.log_dir) / "gradwatch")
    assert [r.global_norm for r in saved.records()] == [r.global_norm for r in watch.history]


def test_a_failing_sink_is_one_warning_and_the_fit_goes_on(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="tb")
    watch = GradWatch(verbose=False, log_every=2, run_dir=False)

    class Closes(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 4:
                self._writer()._closed = True

        def on_train_end(self, trainer, pl_module):
            self._writer()._closed = False  # Lightning itself flushes it at the end

        def _writer(self):
            return logger.experiment._get_file_writer().event_writer._async_writer

    with pytest.warns(GradwatchWarning, match="TensorBoardSink failed"):
        trainer(tmp_path, watch, Closes(), logger=logger, log_every_n_steps=1000).fit(Net(), loader())
    assert len(watch.history) == 12


def test_csv_logger_and_several_loggers_at_once(tmp_path: Path) -> None:
    watch = GradWatch(verbose=False, log_every=4)
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    trainer(tmp_path, watch, logger=loggers, log_every_n_steps=4).fit(Net(), loader())
    assert not watch._session.sinks.failed
    assert len(watch.history) == 12


def test_fast_dev_run_and_a_model_without_parameters_do_no_harm(tmp_path: Path) -> None:
    trainer(tmp_path, quiet(), fast_dev_run=True).fit(Net(), loader())
    assert not (tmp_path / "gradwatch").exists()


def test_the_callback_survives_pickle_and_deepcopy_before_and_after_a_fit(tmp_path: Path) -> None:
    import pickle

    watch = quiet(rules="autoclip", run_dir=False)
    for _ in range(2):
        twin = pickle.loads(pickle.dumps(watch))
        assert twin.state_key == "gradwatch:gradwatch"
        copy.deepcopy(watch)
        trainer(tmp_path, watch).fit(Net(), loader())


def test_the_validation_after_the_last_step_is_judged(tmp_path: Path) -> None:
    watch = quiet(rules=[Expression("val_loss >= 0", name="validated")], run_dir=False)
    trainer(tmp_path, watch).fit(Net(), loader(), loader(2))
    (incident,) = watch.incidents
    assert (incident.name, incident.first_step) == ("validated", 11)


def test_incidents_of_two_optimizers_are_told_apart(tmp_path: Path) -> None:
    watch = quiet(rules=[Expression("global_norm >= 0", name="seen")], run_dir=tmp_path / "run")
    trainer(tmp_path, watch).fit(Gan(), loader(6))
    told = read_run(tmp_path / "run").incidents
    assert [i.name for i in told] == ["seen", "seen"]
    assert len({i.id for i in told}) == 2
    assert {i.id for i in watch.incidents} == {i.id for i in told}


class Forgetful(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.body[0].parameters(), lr=0.05)


def test_a_preflight_speaks_before_step_zero_and_changes_no_bit(tmp_path: Path) -> None:
    def fit(*callbacks):
        model = Forgetful()
        run = trainer(tmp_path, *callbacks)
        torch.manual_seed(5)
        run.fit(model, loader())
        # Not `losses`: a list that training_step itself appends to is the user's own.
        return everything(model, run)[:-1]

    watch = quiet(preflight=True, run_dir=False)
    bare, watched = fit(), fit(watch)
    assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))
    assert watch.preflight_report is not None
    told = [i for i in watch.incidents if i.rule.startswith("preflight_")]
    assert [i.rule for i in told] == [f"preflight_{f.check}" for f in watch.preflight_report]
    assert "preflight_not_in_optimizer" in [i.rule for i in told]
    assert {i.first_step for i in told} == {0}


class Sizes(Statistic):
    """Squared norm of each gradient."""

    name = "sizes_under_lightning"

    def sums(self, view):
        return view.rows([grad.square().sum() for grad in view.grads])


def test_statistics_and_numbers_of_ones_own_are_on_record(tmp_path: Path) -> None:
    class Telling(pl.Callback):
        def on_train_batch_start(self, run, model, batch, number):
            watch.record(number_of_batch=number)

    watch = quiet(statistics=[Sizes()])
    trainer(tmp_path, watch, Telling()).fit(Net("sgd"), loader(3))
    assert [r.scalars["number_of_batch"] for r in watch.history] == [0, 1, 2]
    assert all("sizes_under_lightning" in r.columns for r in watch.history)
