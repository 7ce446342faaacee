"""What watching costs: CPU time per training step of several monitors, interleaved in one process.

    python benchmarks/overhead.py                 # some minutes
    python benchmarks/overhead.py --rounds 3 --model mlp
    python benchmarks/overhead.py --quick

Every arm trains the same model under Lightning's Trainer, and the arms take turns step by step. A round is as long as
gradwatch's longest cadence (100 steps), so that every sampled step is paid for in it; slow arms take fewer steps.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from _baton import Arm, race, table
from _models import GPT, mlp
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import grad_norm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from gradwatch.callbacks import GradWatch


class Task(pl.LightningModule):
    """The model under a Trainer; `log_norms`: Lightning's own recipe for gradient norms."""

    def __init__(self, model: nn.Module, *, log_norms: bool = False) -> None:
        super().__init__()
        self.model, self.log_norms = model, log_norms

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(self.model, GPT):
            return self.model.loss(batch)
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.log_norms:
            self.log_dict(grad_norm(self, norm_type=2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Stream(IterableDataset[Any]):
    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self.batches


class Floor(pl.Callback):
    """The least that any monitor must do: one packed norm and one read."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        norms = torch._foreach_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        self.last = torch.stack(norms).tolist()


class Histograms(pl.Callback):
    """`SummaryWriter.add_histogram` of every gradient."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, p in pl_module.named_parameters():
            trainer.logger.experiment.add_histogram(name, p.grad, trainer.global_step)


class Wandb(pl.Callback):
    """`wandb.watch(log="gradients")` at every step, offline."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        import wandb

        self.run = wandb.init(mode="offline", dir=tempfile.mkdtemp(), project="bench", settings={"silent": True})
        self.run.watch(pl_module, log="gradients", log_freq=1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.run.log({"loss": float(outputs["loss"])})

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.run.finish()


def everything() -> GradWatch:
    """All that gradwatch can measure, at every step, written to TensorBoard at every step."""
    return GradWatch(
        every=1, activations_every=1, updates_every=1, histograms_every=1, log_every=1, verbose=False, name="everything"
    )


def arm(
    name: str,
    make_model: Callable[[], nn.Module],
    folder: Path,
    callback: Callable[[], pl.Callback] | None,
    steps: int,
    **task: Any,
) -> Arm:
    def run(batches: Iterator[Any]) -> None:
        torch.manual_seed(0)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=TensorBoardLogger(folder, name=name.replace(" ", "-"), version=""),
            callbacks=[callback()] if callback else [],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(Task(make_model(), **task), DataLoader(Stream(batches), batch_size=None))

    return Arm(name, run, steps)


def arms(options: argparse.Namespace, folder: Path) -> list[Arm]:
    make = (lambda: GPT()) if options.model == "gpt" else mlp
    block, few = options.block, max(2, options.block // 25)
    found = [
        arm("bare", make, folder, None, block),
        arm("floor", make, folder, Floor, block),
        arm("gradwatch observe", make, folder, lambda: GradWatch(rules="observe", verbose=False), block),
        arm("gradwatch", make, folder, lambda: GradWatch(verbose=False), block),
        arm("gradwatch autoclip", make, folder, lambda: GradWatch(rules="autoclip", verbose=False), block),
        arm("gradwatch everything", make, folder, everything, few * 5),
    ]
    if options.only:
        return [a for a in found if a.name == "bare" or a.name in options.only]
    if not options.ours:
        found.append(arm("log_dict(grad_norm)", make, folder, None, few * 5, log_norms=True))
        found.append(arm("add_histogram", make, folder, Histograms, few))
        try:
            import wandb  # noqa: F401 - only with the package there
        except ImportError:
            print("wandb is not installed: its arm is left out")
        else:
            found.append(arm("wandb.watch", make, folder, Wandb, few))
    return found


def batches(model: str) -> Callable[[int], Any]:
    generator = torch.Generator().manual_seed(1)
    if model == "gpt":
        return lambda i: torch.randint(0, 1500, (1, 129), generator=generator)
    x, y = torch.randn(256, 1820, generator=generator), torch.randint(0, 10, (256,), generator=generator)
    return lambda i: (x, y)


def main(arguments: list[str] | None = None) -> list[tuple[str, float, float, float, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("gpt", "mlp"), default="gpt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block", type=int, default=100, help="steps per round of the quick arms")
    parser.add_argument("--warmup", type=int, default=70, help="steps of each arm before the first round")
    parser.add_argument("--only", nargs="+", help="these arms beside the bare one")
    parser.add_argument("--ours", action="store_true", help="leave the other monitors out")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.block = 1, 10
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    os.environ["WANDB_SILENT"] = "true"
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        found = arms(options, Path(folder))
        race(found, batches(options.model), rounds=options.rounds, warmup=options.warmup)
    rows = table(found)
    print(f"\n{options.model}, one thread, {options.rounds} rounds of {options.block} steps, CPU time\n")
    print("| monitor | x bare step | quartiles | ms a step |\n|---|---|---|---|")
    for name, median, low, high, milliseconds in rows:
        print(f"| {name} | {median:.3f} | {low:.3f} - {high:.3f} | {milliseconds:.1f} |")
    return rows


if __name__ == "__main__":
    main()
