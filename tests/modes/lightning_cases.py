"""What two ranks run under Lightning's `ddp` strategy with the callback."""

from __future__ import annotations

import contextlib
import io
import math
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader, Dataset

from gradwatch.callbacks import GradWatch
from gradwatch.rules import NonFinite
from gradwatch.treatments import Checkpoint, ClipByGlobalNorm, Stop
from tests.modes.ranks import counted, equal_on_all_ranks, main
from tests.modes.reference import (
    EVERYTHING,
    ROWS,
    STEPS,
    Net,
    batches,
    compare,
    loss_of,
    mine,
    same,
    sgd,
    train_in_float64,
)


class Batches(Dataset):
    """Batches of this rank, one after the other: no sampler may reorder them."""

    def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pairs[i]


class Module(pl.LightningModule):
    def __init__(self, net: Net, rank: int, bad: dict[int, int] | None = None, **flags: Any) -> None:
        super().__init__()
        self.net, self.number, self.bad, self.flags = net, rank, bad or {}, flags

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = loss_of(self.net, batch)
        return loss * math.nan if self.bad.get(batch_idx) == self.number else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        # Not synchronized: each rank has its own value.
        self.log("val_loss", loss_of(self.net, batch) + self.number)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.net)


def loader(data: Any, rank: int) -> DataLoader:
    return DataLoader(Batches([mine(pair, rank) for parts in data for pair in parts]), batch_size=None)


def trainer(folder: Path, *callbacks: pl.Callback, strategy: Any = None, **options: Any) -> pl.Trainer:
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "use_distributed_sampler": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    strategy = DDPStrategy(process_group_backend="gloo") if strategy is None else strategy
    settings |= {"accelerator": "cpu", "devices": dist.get_world_size(), "strategy": strategy}
    return pl.Trainer(callbacks=list(callbacks), **(settings | options))


def quiet(**options: Any) -> GradWatch:
    return GradWatch(**{"verbose": False, "on_error": "raise", "run_dir": False, "rules": "observe"} | options)


def fit(rank, world, folder, *callbacks, micro=1, bad=None, net=None, strategy=None, validation=False, **options):
    net = net or Net()
    module = Module(net, rank, bad)
    run = trainer(folder, *callbacks, strategy=strategy, accumulate_grad_batches=micro, **options)
    data = batches(world, STEPS, micro)
    run.fit(module, loader(data, rank), loader(data[:1], rank) if validation else None)
    for watch in callbacks:
        if isinstance(watch, GradWatch):
            equal_on_all_ranks(same(watch.history))
            equal_on_all_ranks([str(i) for i in watch.incidents])
    return run, net


def against_reference(rank, world, folder, *, reference=None, watch=None, tied=False, idle=False, **options):
    net = Net(tied=tied, idle=idle)
    data = batches(world, STEPS, options.get("micro", 1))
    twin, expected = train_in_float64(net, data, **(reference or {}))
    watch = watch or quiet(**EVERYTHING)
    fit(rank, world, folder, watch, net=net, **options)
    for want in expected:
        for table in (want.norms, want.histograms, want.ratios):
            for name in list(table):
                table[f"net.{name}"] = table.pop(name)
    compare(watch.history, expected)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-6)
    assert [r.num_samples for r in watch.history] == [world * ROWS * options.get("micro", 1)] * STEPS
    return watch


def plain(rank: int, world: int, folder: Path) -> None:
    against_reference(rank, world, folder)


def find_unused(rank: int, world: int, folder: Path) -> None:
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    against_reference(rank, world, folder, idle=True, strategy=strategy)


def static_graph(rank: int, world: int, folder: Path) -> None:
    against_reference(rank, world, folder, strategy=DDPStrategy(process_group_backend="gloo", static_graph=True))


def accumulation(rank: int, world: int, folder: Path) -> None:
    against_reference(rank, world, folder, micro=3)


def tied(rank: int, world: int, folder: Path) -> None:
    against_reference(rank, world, folder, tied=True)


def clip(rank: int, world: int, folder: Path) -> None:
    watch = quiet(**EVERYTHING, treatments=ClipByGlobalNorm(0.5))
    against_reference(rank, world, folder, watch=watch, reference={"max_norm": 0.5})


def nan_on_one_rank(rank: int, world: int, folder: Path) -> None:
    watch = quiet(**EVERYTHING, rules="autoclip")
    against_reference(rank, world, folder, watch=watch, reference={"bad": (3,)}, bad={3: 1})
    (incident,) = watch.incidents
    assert (incident.rule, incident.treatments) == ("non_finite", ("skip_step",))


def neutral(rank: int, world: int, folder: Path) -> None:
    _, bare = fit(rank, world, folder, micro=2)
    _, watched = fit(rank, world, folder, quiet(**EVERYTHING, rules="default"), micro=2)
    assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), watched.parameters(), strict=True))


def validation_of_each_rank(rank: int, world: int, folder: Path) -> None:
    watch = quiet(rules="default")
    fit(rank, world, folder, watch, validation=True, val_check_interval=2)
    assert "val_loss" in watch.history[2].scalars


def actions(rank: int, world: int, folder: Path) -> None:
    watch = quiet(rules=[NonFinite(then=[Checkpoint(), Stop()])], run_dir=folder / "run")
    run, _ = fit(rank, world, folder, watch, bad={2: 1}, max_epochs=4)
    equal_on_all_ranks((run.global_step, run.should_stop))
    assert run.should_stop
    assert run.global_step < 4 * STEPS
    assert len(list((folder / "run").glob("*.ckpt"))) == 1


def rank_zero_writes(rank: int, world: int, folder: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        watch = GradWatch(log_every=2, on_error="raise")
        fit(rank, world, folder, watch, bad={2: 1}, logger=TensorBoardLogger(folder, name="tb"))
    dist.barrier()
    assert bool("gradwatch" in err.getvalue()) == (rank == 0), err.getvalue()
    assert "gradwatch" not in out.getvalue()
    (version,) = (folder / "tb").iterdir()
    assert (version / "gradwatch").is_dir()
    # Lightning's writer, and TensorBoard's own file of hyperparameters: none is another rank's.
    assert all(str(os.getpid()) in p.name for p in version.rglob("*tfevents*")) == (rank == 0)
    assert len(list(folder.rglob("meta.json"))) <= 1


def one_small_sum(rank: int, world: int, folder: Path) -> None:
    def sums(*callbacks: pl.Callback) -> list[tuple[str, int, int]]:
        with counted() as made:
            fit(rank, world, folder, *callbacks)
        return made

    bare, watched = sums(), sums(quiet(rules="default", activations_every=None))
    # One more at the first step: whether all ranks hold the same.
    assert len(watched) - len(bare) == 1 + STEPS


def resume_alone(rank: int, world: int, folder: Path) -> None:
    """Saved by two ranks, gone on with by one: see the test, which resumes it."""
    watch = quiet(rules="autoclip")
    run, _ = fit(rank, world, folder, watch, bad={3: 1})
    run.save_checkpoint(folder / "two.ckpt")


CASES = {
    "plain": plain,
    "find-unused-parameters": find_unused,
    "static-graph": static_graph,
    "accumulation": accumulation,
    "tied-weights": tied,
    "clip": clip,
    "nan-on-one-rank": nan_on_one_rank,
    "neutral": neutral,
    "validation-of-each-rank": validation_of_each_rank,
    "checkpoint-and-stop": actions,
    "rank-zero-writes": rank_zero_writes,
    "one-small-sum-a-step": one_small_sum,
    "resume-on-fewer-ranks": resume_alone,
}

if __name__ == "__main__":
    main(CASES)
