"""Modes of Lightning's Trainer in one process: bits unchanged, numbers as in float64, both norms where two clip."""

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from gradwatch.callbacks import GradWatch
from gradwatch.treatments import ClipByGlobalNorm
from tests.modes.lightning_cases import Module, loader
from tests.modes.reference import EVERYTHING, STEPS, Net, batches, compare, sgd, train_in_float64


def quiet(**options: Any) -> GradWatch:
    return GradWatch(
        **{"verbose": False, "on_error": "raise", "run_dir": False, "rules": "observe", **EVERYTHING, **options}
    )


def fit(
    folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, micro: int = 1, **options: Any
) -> pl.Trainer:
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    run = pl.Trainer(callbacks=list(callbacks), accumulate_grad_batches=micro, **(settings | options))
    torch.manual_seed(5)
    run.fit(module, loader(batches(1, STEPS, micro), 0))
    return run


def expected_of(micro: int = 1, **reference: Any) -> list[Any]:
    found = train_in_float64(Net(), batches(1, STEPS, micro), **reference)[1]
    for want in found:
        for table in (want.norms, want.histograms, want.ratios):
            for name in list(table):
                table[f"net.{name}"] = table.pop(name)
    return found


def equal(a: pl.LightningModule, b: pl.LightningModule) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("micro", [1, 3], ids=["plain", "accumulated"])
def test_numbers_are_right(tmp_path: Path, micro: int) -> None:
    watch = quiet()
    fit(tmp_path, Module(Net(), 0), watch, micro=micro)
    compare(watch.history, expected_of(micro))


def test_the_trainers_clip_after_ours_is_on_record_with_both_norms(tmp_path: Path) -> None:
    watch, module = quiet(treatments=ClipByGlobalNorm(0.5)), Module(Net(), 0)
    fit(tmp_path, module, watch, gradient_clip_val=0.1)
    assert "Lightning's gradient_clip_val=0.1 (by norm) changed the gradients" in watch.summary()
    twin, want = train_in_float64(Net(), batches(1), max_norm=0.1)
    for record, step in zip(watch.history, want, strict=True):
        assert record.global_norm == pytest.approx(step.global_norm, rel=1e-4)
        assert record.global_norm_after == pytest.approx(min(0.5, step.global_norm), rel=1e-4)
        assert record.scalars["trainer_clip"] == 0.1
        assert record.scalars["global_norm_applied"] == pytest.approx(step.global_norm_after, rel=1e-4)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-6)


class Skips(Module):
    """Gives no loss at one batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


class Turns(Module):
    """Two optimizers, each on its own half, by hand."""

    def __init__(self) -> None:
        super().__init__(Net(), 0)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return sgd(self.net.body), sgd(self.net.last)


class LateThaw(Module):
    """Thaws its first layer in mid-run."""

    def configure_optimizers(self) -> Any:
        self.net.first.requires_grad_(False)
        return sgd(self.net)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net.first.requires_grad_(batch_idx >= 3)


class Lbfgs(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.net.parameters(), lr=0.1, max_iter=3)


CELLS = {
    "plain": (lambda: Module(Net(), 0), {}, ()),
    "bf16-mixed": (lambda: Module(Net(), 0), {"precision": "bf16-mixed"}, ()),
    "bf16-true": (lambda: Module(Net(), 0), {"precision": "bf16-true"}, ()),
    "accumulation": (lambda: Module(Net(), 0), {"micro": 3}, ()),
    "trainers-clip-by-value": (
        lambda: Module(Net(), 0),
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        (),
    ),
    "training-step-gives-none": (lambda: Skips(Net(), 0), {}, ()),
    "manual-optimizers-in-turns": (Turns, {}, ()),
    "thawed-in-mid-run": (lambda: LateThaw(Net(), 0), {}, ()),
    "lbfgs": (lambda: Lbfgs(Net(), 0), {}, ()),
    "detect-anomaly": (lambda: Module(Net(), 0), {"detect_anomaly": True}, ()),
    "stochastic-weight-averaging": (
        lambda: Module(Net(), 0),
        {"max_epochs": 3},
        (lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),),
    ),
    "weight-averaging": (lambda: Module(Net(), 0), {}, (WeightAveraging,)),
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.filterwarnings("ignore:.*bf16.*", "ignore:.*swa.*:UserWarning", "ignore:.*SWA.*:UserWarning")
def test_watched_and_unwatched_fits_end_with_the_same_bits(tmp_path: Path, cell: str) -> None:
    make, options, others = CELLS[cell]
    bare, watched, watch = make(), make(), quiet(rules="default")
    first = fit(tmp_path, bare, *(make() for make in others), **options)
    second = fit(tmp_path, watched, watch, *(make() for make in others), **options)
    assert equal(bare, watched)
    assert first.global_step == second.global_step
    assert len({(r.step, r.scalars.get("optimizer")) for r in watch.history}) == len(watch.history)
    assert len(watch.history) == second.global_step
    assert all(math.isfinite(r.global_norm) for r in watch.history if r.has_gradient)
    assert all(r.has_gradient for r in watch.history) or cell == "training-step-gives-none"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.modules())
