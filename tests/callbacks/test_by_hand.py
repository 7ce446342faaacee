"""Hooks that are called outside of a fit, states that come from elsewhere, copies: none of it harms the program."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateFinder
from pytorch_lightning.tuner import Tuner
from torch.utils.data import DataLoader, TensorDataset

from gradwatch import GradwatchWarning, Watch
from gradwatch.callbacks import GradWatch

EVERYTHING = {"activations_every": 1, "updates_every": 1, "histograms_every": 1, "log_every": 1}
KEY = "gradwatch:gradwatch"


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        self.lr = 0.1

    def training_step(self, batch, batch_idx):
        return self.layers(batch[0]).square().mean() if batch_idx % 2 else None

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layers(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr)


def data() -> DataLoader:
    return DataLoader(TensorDataset(torch.linspace(-1, 1, 64).reshape(16, 4)), batch_size=4)


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **options})


def watch(folder: Path, **options: Any) -> GradWatch:
    return GradWatch(**{"verbose": False, "on_error": "raise", "run_dir": folder / "run", **EVERYTHING, **options})


def everything(run: pl.Trainer, net: Net) -> list[torch.Tensor]:
    states = [v for s in run.optimizers[0].state_dict()["state"].values() for v in s.values()]
    return [*net.parameters(), *states, torch.tensor(run.global_step)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(autouse=True)
def without_lightnings_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning")
        warnings.filterwarnings("ignore", category=UserWarning, message=".*`training_step` returned `None`.*")
        yield


def go_on_by_hand(run: pl.Trainer, net: Net) -> None:
    """Run the loop's own optimization after the fit, as tests of loops do: it calls every callback."""
    run.state.stage = "train"
    loop = run.fit_loop.epoch_loop
    for i, batch in enumerate(data()):
        for callback in run.callbacks:
            callback.on_train_batch_start(run, net, batch, i)
        loop.automatic_optimization.run(run.optimizers[0], i, {"batch": batch, "batch_idx": i})
        for callback in run.callbacks:
            callback.on_train_batch_end(run, net, None, batch, i)
            callback.on_validation_end(run, net)
            callback.on_train_end(run, net)


def test_hooks_called_after_the_fit_measure_nothing_and_raise_nothing(tmp_path: Path) -> None:
    ended = []
    for callbacks in ([], [watch(tmp_path, rules="autoclip", conflicts_every=1)]):
        net = Net()
        run = trainer(tmp_path, *callbacks)
        run.fit(net, data())
        go_on_by_hand(run, net)
        ended.append(everything(run, net))
    assert same(*ended)
    (mine,) = callbacks
    assert [r.step for r in mine.history] == list(range(8))
    mine.annotate("after the fit", silence=3)
    assert mine.report(tmp_path / "report.html").exists()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_closed_watch_lets_the_optimizer_step_and_puts_nothing_back_on_the_model(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watch(model, optimizer, run_dir=tmp_path / "run", on_error="raise", **EVERYTHING) as mine:
        pass
    before = model.weight.detach().clone()
    model(torch.ones(2, 4)).sum().backward()
    mine.step(loss=1.0)
    mine.annotate("late")
    mine.validation(loss=1.0)
    assert not torch.equal(before, model.weight)
    assert mine.history == []
    assert not model._forward_hooks


def test_fits_one_after_another_and_evaluations_between_them_are_watched_as_bare(tmp_path: Path) -> None:
    ended = []
    for name in ("bare", "watched"):
        folder = tmp_path / name
        callbacks = [] if name == "bare" else [watch(folder)]
        net, other, run = Net(), Net(), trainer(folder, *callbacks)
        run.validate(net, data(), verbose=False)
        run.fit(net, data(), data())
        run.validate(net, data(), verbose=False)
        run.fit_loop.max_epochs = 3
        run.fit(other, data(), data())
        run.save_checkpoint(folder / "x.ckpt")
        run.fit_loop.max_epochs = 4
        run.fit(net, data(), ckpt_path=folder / "x.ckpt")
        ended.append([*everything(run, net), *other.parameters()])
    assert same(*ended)
    assert [r.step for r in callbacks[0].history] == list(range(12, 16))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_steps": 0, "max_epochs": None}, id="no-steps"),
        pytest.param({"max_epochs": 0}, id="no-epochs"),
        pytest.param({"limit_train_batches": 0}, id="no-batches"),
        pytest.param({"overfit_batches": 1}, id="one-batch"),
        pytest.param({"accumulate_grad_batches": 3}, id="steps-without-a-gradient-among-others"),
        pytest.param({"detect_anomaly": True, "inference_mode": False}, id="anomaly"),
    ],
)
def test_a_fit_of_whatever_length_is_watched_as_bare(options: dict[str, Any], tmp_path: Path) -> None:
    ended = []
    for callbacks in ([], [watch(tmp_path)]):
        net, run = Net(), trainer(tmp_path, *callbacks, **options)
        run.fit(net, data(), data())
        run.save_checkpoint(tmp_path / "x.ckpt")
        ended.append(everything(run, net))
    assert same(*ended)


class InTheMiddle(LearningRateFinder):
    def on_fit_start(self, *args: Any) -> None: ...

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("how", ["before", "at-the-start", "in-the-middle"])
def test_a_search_for_a_rate_runs_its_fit_inside_as_bare(how: str, tmp_path: Path) -> None:
    ended = []
    for callbacks in ([], [watch(tmp_path)]):
        finders = {"before": [], "at-the-start": [LearningRateFinder(num_training_steps=6)]}
        run = trainer(tmp_path, *callbacks, *finders.get(how, [InTheMiddle(num_training_steps=6)]))
        net = Net()
        if how == "before":
            Tuner(run).lr_find(net, data(), num_training=6)
        run.fit(net, data())
        ended.append(everything(run, net))
    assert same(*ended)
    assert [r.step for r in callbacks[0].history] == list(range(8))


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({"version": 1, "judge": 7}, id="other-types"),
        pytest.param({"x": torch.ones(2)}, id="of-something-else"),
        pytest.param({"version": 1, "treatments": [{"name": 1}], "rates": []}, id="halves"),
        pytest.param("words", id="no-mapping"),
        pytest.param(None, id="none"),
    ],
)
def test_a_run_goes_on_from_a_checkpoint_whose_state_of_ours_can_not_be_read(state: Any, tmp_path: Path) -> None:
    bare = trainer(tmp_path)
    bare.fit(Net(), data())
    bare.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    checkpoint["callbacks"] = {} if state is None else {KEY: state}
    torch.save(checkpoint, tmp_path / "x.ckpt")
    mine = watch(tmp_path, on_error="warn", rules="autoclip")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=GradwatchWarning)
        run = trainer(tmp_path, mine, max_epochs=3)
        run.fit(Net(), data(), ckpt_path=tmp_path / "x.ckpt")
    assert [r.step for r in mine.history] == list(range(8, 12))


def test_a_checkpoint_that_is_only_evaluated_leaves_the_next_fit_fresh(tmp_path: Path) -> None:
    first = trainer(tmp_path, watch(tmp_path))
    first.fit(Net(), data())
    first.save_checkpoint(tmp_path / "x.ckpt")
    mine = watch(tmp_path / "second")
    trainer(tmp_path, mine).validate(Net(), data(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert mine.state_dict() == {}
    trainer(tmp_path, mine).fit(Net(), data())
    assert [r.step for r in mine.history] == list(range(8))


def test_copies_of_a_trainer_and_pickles_of_the_callback_carry_no_model_and_work(tmp_path: Path) -> None:
    mine = watch(tmp_path)
    fresh = len(pickle.dumps(mine))
    net, run = Net(), trainer(tmp_path, mine)
    run.fit(net, data())
    assert len(pickle.dumps(mine)) < fresh + 200
    twin = copy.deepcopy(run)
    twin.fit_loop.max_epochs = 3
    twin.fit(Net(), data())
    (copied,) = (c for c in twin.callbacks if isinstance(c, GradWatch))
    assert copied is not mine
    assert [r.step for r in copied.history] == list(range(8, 12))
    assert [r.step for r in mine.history] == list(range(8))
