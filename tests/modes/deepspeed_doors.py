"""DeepSpeed as trainers run it: Accelerate, the Hugging Face Trainer, Lightning's strategy."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch import Watch
from gradwatch.rules import NonFinite
from gradwatch.treatments import ClipByGlobalNorm, SkipStep
from tests.modes.ranks import equal_on_all_ranks
from tests.modes.reference import EVERYTHING, ROWS, STEPS, Net, batches, compare, loss_of, mine, same, train_in_float64

REFERENCE: dict[str, Any] = {"max_norm": 0.5, "bad": (4,), "spikes": {2: 1000.0}}


@contextmanager
def of_its_own() -> Iterator[None]:
    """Accelerate keeps what it has found out about a process for good: a later case is to begin without that."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    before = dict(os.environ)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


def treated() -> dict[str, Any]:
    return {"rules": [NonFinite(then=SkipStep())], "treatments": ClipByGlobalNorm(0.5), **EVERYTHING}


def factor(step: int, rank: int, world: int) -> float:
    """What a step's loss is multiplied by: a spike on all ranks, and a loss on the last one that is not finite."""
    return 1000.0 if step == 2 else math.nan if step == 4 and rank == world - 1 else 1.0


def check(watch: Any, expected: Any, engine: Any, twin: nn.Module, *, prefix: str = "", losses: bool = True) -> None:
    from deepspeed.utils import safe_get_full_fp32_param

    for want in expected:
        for table in (want.norms, want.histograms, want.ratios):
            for name in list(table):
                table[f"{prefix}{name}"] = table.pop(name)
    equal_on_all_ranks(same(watch.history))
    compare(watch.history, expected, rel=1e-5, losses=losses)
    assert [r.step for r in watch.history if r.skipped] == [4]
    assert [i.rule for i in watch.incidents] == ["non_finite"]
    for p, q in zip(engine.module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(safe_get_full_fp32_param(p).double(), q, rtol=1e-4, atol=1e-6)


def in_accelerate(form: Any, config: dict[str, Any], make: Any, rank: int, world: int) -> None:
    """Its backward lets DeepSpeed step, too: `watch.step` comes after that."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    data = batches(world, micro=form.micro)
    twin, expected = train_in_float64(Net(), data, optimizer=make, **REFERENCE)
    with of_its_own():
        plugin = DeepSpeedPlugin(hf_ds_config=config)
        accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=form.micro)
        net = Net()
        engine, optimizer = accelerator.prepare(net, make(net))
        with Watch(engine, optimizer, on_error="raise", **treated()) as watch:
            for step, parts in enumerate(data):
                for part in parts:
                    with accelerator.accumulate(engine):
                        loss = loss_of(engine, mine(part, rank)) * factor(step, rank, world)
                        accelerator.backward(loss)
                        watch.step(loss=loss.detach())
                        optimizer.zero_grad()
        check(watch, expected, engine, twin)
        assert "step" not in vars(engine.optimizer)
        assert not {"backward", "scale"} & vars(engine).keys()


class Model(nn.Module):
    """A model as the Hugging Face Trainer takes it."""

    def __init__(self, rank: int, world: int, micro: int) -> None:
        super().__init__()
        self.net = Net()
        self.rank, self.world, self.micro, self.calls = rank, world, micro, 0

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        step, self.calls = self.calls // self.micro, self.calls + 1
        return {"loss": loss_of(self.net, (x, y)) * factor(step, self.rank, self.world)}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 0.01, eps=1e-4, weight_decay=0.0)


def in_trainer(form: Any, config: dict[str, Any], rank: int, world: int, folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from gradwatch.callbacks.transformers import GradWatchCallback

    data = batches(world, micro=form.micro)
    twin, expected = train_in_float64(Net(), data, optimizer=adamw, **REFERENCE)
    # Under DeepSpeed on a CPU the Trainer takes each process for one alone, and deals nothing out.
    share = [mine(part, rank) for parts in data for part in parts]
    rows = [{"x": x, "y": y} for xs, ys in share for x, y in zip(xs, ys, strict=True)]
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {k: v for k, v in config.items() if k != "train_batch_size"} | dict.fromkeys(auto, "auto")
    with of_its_own():
        args = TrainingArguments(
            output_dir=str(folder),
            deepspeed=config,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=form.micro,
            max_steps=STEPS,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            # Under DeepSpeed it makes its own, whatever `optimizers` holds.
            optim="adamw_torch",
            learning_rate=0.01,
            adam_epsilon=1e-4,
            weight_decay=0.0,
            train_sampling_strategy="sequential",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        model = Model(rank, world, form.micro)
        watch = GradWatchCallback(verbose=False, run_dir=False, on_error="raise", **treated())
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[watch])
        trainer.train()
        check(watch, expected, trainer.deepspeed, twin, prefix="net.")
        assert "step" not in vars(trainer.deepspeed.optimizer)


def in_lightning(form: Any, config: dict[str, Any], make: Any, rank: int, world: int, folder: Path) -> None:
    from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy

    from tests.modes.lightning_cases import Module, loader, quiet, trainer

    class OnCPU(DeepSpeedStrategy):
        """Lightning's own strategy without its refusal of any device but CUDA's."""

        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu", 0)

        def setup_environment(self) -> None:
            super(DeepSpeedStrategy, self).setup_environment()

        def setup_distributed(self) -> None:
            super(DeepSpeedStrategy, self).setup_distributed()

    class Own(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return loss_of(self.net, batch) * factor(batch_idx // form.micro, rank, world)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make(self.net)

    data = batches(world, micro=form.micro)
    # Lightning divides the loss by the micro-batches, and DeepSpeed the gradients once more.
    twice = {"loss": lambda model, pair: loss_of(model, pair) / form.micro}
    twin, expected = train_in_float64(Net(), data, optimizer=make, **REFERENCE, **twice)
    sizes = ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    strategy = OnCPU(config={k: v for k, v in config.items() if k not in sizes}, process_group_backend="gloo")
    assert isinstance(strategy, DDPStrategy)
    watch = quiet(**treated())
    run = trainer(folder, watch, strategy=strategy, accumulate_grad_batches=form.micro)
    module = Own(Net(), rank)
    with contextlib.redirect_stdout(None):
        run.fit(module, loader(data, rank))
    check(watch, expected, run.model, twin, prefix="net.", losses=form.micro == 1)
