"""A training that is taken back in the running fit of every trainer is, bit for bit, what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lightning.fabric import Fabric
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.trainer_callback import TrainerCallback

from gradwatch import Watch
from gradwatch.callbacks import GradWatch
from gradwatch.callbacks.fabric import GradWatch as FabricGradWatch
from gradwatch.callbacks.transformers import GradWatchCallback
from tests.callbacks import hf
from tests.treatments._rollback import Net, at, copied, equal

QUIET = {"activations_every": None, "updates_every": None, "histograms_every": None, "run_dir": False, "verbose": False}


class Module(pl.LightningModule):
    def __init__(self, *, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()
        self.automatic_optimization = not manual
        self.seen: list[float] = []

    def training_step(self, batch: Any, index: int) -> Any:
        (x,) = batch
        self.seen.append(float(x.sum()))
        loss = nn.functional.cross_entropy(self.net(x), (x.sum(1) > 0).long())
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), 1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Keeper(pl.Callback):
    """Copies everything after each optimizer step, when the other callbacks have had their turn."""

    def __init__(self, average: EMAWeightAveraging | None = None) -> None:
        self.states: dict[int, Any] = {}
        self.rates: dict[int, float] = {}
        self._average = average

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step in self.states:
            return
        (optimizer,) = trainer.optimizers
        parts = [pl_module, optimizer]
        parts += [] if self._average is None else [self._average._average_model]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.states[trainer.global_step] = copied(*parts, *([] if scaler is None else [scaler]))
        self.rates[trainer.global_step] = optimizer.param_groups[0]["lr"]


def without_rates(state: Any) -> Any:
    """Leave out what schedulers write: it goes on."""
    model, (optimizer, own), *more = state
    groups = [{k: v for k, v in group.items() if k not in ("lr", "initial_lr")} for group in optimizer["param_groups"]]
    return [model, {**optimizer, "param_groups": groups}, own, *more]


def fit(watch: GradWatch, module: Module, *callbacks: Any, steps: int = 40, **options: Any) -> pl.Trainer:
    generator = torch.Generator().manual_seed(1)
    data = DataLoader(TensorDataset(torch.randn(8 * 100, 6, generator=generator)), batch_size=8)
    settings = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    settings |= {"enable_checkpointing": False, "max_steps": steps}
    trainer = pl.Trainer(callbacks=[watch, *callbacks], **{**settings, **options})
    trainer.fit(module, data)
    return trainer


WAYS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "manual": {"manual": True},
    "accumulating": {"accumulate_grad_batches": 2},
    "scaler": {"scaler": True},
}


CASES = [
    pytest.param(way, first, marks=[] if (way, first) in (("automatic", True), ("manual", False)) else pytest.mark.slow)
    for way in WAYS
    for first in (True, False)
]


@pytest.mark.parametrize(("way", "first"), CASES)
def test_lightning(way: str, first: bool) -> None:
    options = dict(WAYS[way])
    module = Module(manual=options.pop("manual", False))
    if options.pop("scaler", False):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=7)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    watch, average = GradWatch(rules=[at(25)], **QUIET), EMAWeightAveraging(decay=0.9)
    keeper = Keeper(average)
    callbacks = [average, keeper] if first else [keeper]
    if first:
        fit(watch, module, *callbacks, **options)
    else:
        fit(average, module, watch, *callbacks, **options)  # type: ignore[arg-type]
    assert equal(without_rates(keeper.states[26]), without_rates(keeper.states[10]))
    assert not equal(without_rates(keeper.states[27]), without_rates(keeper.states[11]))
    assert keeper.rates[26] == pytest.approx(1e-2 * 0.98**26)
    assert len(set(module.seen)) == len(module.seen)
    assert watch.incidents[0].details["rollback"] == "rolled back from 25 to 10 (1 of 3)"


def test_lightnings_schedulers_return_where_they_are_asked_to() -> None:
    watch, keeper = GradWatch(rules=[at(25, schedulers="return")], **QUIET), Keeper()
    fit(watch, Module(), keeper)
    assert equal(keeper.states[26], keeper.states[10])
    assert keeper.rates[30] == keeper.rates[14]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_a_lightning_run_that_is_resumed_remembers_its_budget(tmp_path: Path) -> None:
    first = GradWatch(rules=[at(12, 20, max_times=2)], **QUIET)
    trainer = fit(first, Module(), steps=24)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = GradWatch(rules=[at(30, max_times=2)], **QUIET)
    generator = torch.Generator().manual_seed(1)
    data = DataLoader(TensorDataset(torch.randn(8 * 100, 6, generator=generator)), batch_size=8)
    settings = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    with pytest.raises(Exception, match="has gone back 2 times already"):
        pl.Trainer(callbacks=[second], max_steps=40, enable_checkpointing=False, **settings).fit(
            Module(), data, ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )


class HfKeeper(TrainerCallback):
    def __init__(self) -> None:
        self.states: dict[int, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states[state.global_step] = copied(kwargs["model"], getattr(kwargs["optimizer"], "optimizer", None))


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["", "accumulating"])
def test_the_hugging_face_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    watch, keeper = GradWatchCallback(rules=[at(15, steps=5)], **QUIET), HfKeeper()
    hf.trainer(tmp_path, watch, keeper, max_steps=20, **options).train()
    assert watch.incidents[0].details["rollback"] == "rolled back from 15 to 10 (1 of 3)"
    assert equal(without_rates(keeper.states[16]), without_rates(keeper.states[10]))
    assert not equal(without_rates(keeper.states[17]), without_rates(keeper.states[11]))


def test_fabric() -> None:
    watch = FabricGradWatch(rules=[at(25)], **QUIET)
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[watch])
    torch.manual_seed(0)
    net = Net()
    plain = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), 1e-2)
    average = torch.optim.swa_utils.AveragedModel(net)
    model, optimizer = fabric.setup(net, plain)
    watch.register(average=average)
    states = {}
    for step in range(30):
        x = torch.randn(8, 6)
        loss = nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long())
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        states[step + 1] = copied(net, plain, average)
        average.update_parameters(net)
    fabric.call("on_train_end")
    assert equal(states[26], states[10])
    assert not equal(states[27], states[11])


def test_accelerate() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    net = Net()
    plain = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), 1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(plain, 0.9)
    model, optimizer, scheduler = accelerator.prepare(net, plain, schedule)
    states, step = {}, 0
    with Watch(model, optimizer, rules=[at(25, schedulers="return")]) as watch:
        watch.register(scheduler=scheduler)
        for _ in range(60):
            with accelerator.accumulate(model):
                x = torch.randn(8, 6)
                loss = nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long())
                accelerator.backward(loss)
                watch.step(loss=loss)
                if accelerator.sync_gradients:
                    step += 1
                    states[step] = copied(net, plain, scheduler)
                scheduler.step()
                optimizer.zero_grad()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    assert equal(states[26], states[10])
    assert not equal(states[27], states[11])
