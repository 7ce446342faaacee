"""One model, one dataset, one seed, trained five ways, watched or not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments

from gradwatch import Watch
from gradwatch.callbacks import GradWatch
from gradwatch.callbacks.fabric import GradWatch as FabricGradWatch
from gradwatch.callbacks.transformers import GradWatchCallback

SIZE = 8


class Batches(Dataset):
    """Items in a fixed order; the labels of one batch are a thousand times too large, another holds a NaN."""

    def __init__(self, num: int, spikes: tuple[int, ...] = (), bad: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(num * SIZE, 6, generator=generator)
        self.y = torch.sin(self.x.sum(1, keepdim=True)) + 0.5 * torch.randn(num * SIZE, 1, generator=generator)
        for i in spikes:
            self.y[i * SIZE : (i + 1) * SIZE] *= 1000
        for i in bad:
            self.x[i * SIZE] = float("nan")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "labels": self.y[i]}


class Layers:
    """What the plain model and the LightningModule have in common."""

    def build(self, dropout: float) -> None:
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.head = nn.Linear(16, 1)

    def both(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(x))
        return {"loss": (logits - labels).square().mean(), "logits": logits}


class Net(nn.Module, Layers):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.build(dropout)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return self.both(x, labels)


class LitNet(pl.LightningModule, Layers):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.build(dropout)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        return self.both(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self)


@dataclass
class Job:
    """What to train.

    Attributes:
        watched: settings of the adapter; None trains without it.
        resume: what an earlier run's `Done.saved` holds.
        clip: the trainer's own clip.
    """

    folder: Path
    data: Batches
    epochs: int = 1
    accumulate: int = 1
    watched: dict[str, Any] | None = None
    dropout: float = 0.0
    resume: Any = None
    clip: float = 0.0
    bf16: bool = False

    def options(self) -> dict[str, Any]:
        return {"on_error": "raise", **(self.watched or {})}

    def loader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=SIZE)


@dataclass
class Done:
    model: nn.Module
    optimizer: Any
    watch: Any
    saved: Any = None
    extra: dict[str, Any] = field(default_factory=dict)

    def everything(self) -> list[Tensor]:
        raw = self.optimizer
        while not type(raw).__module__.startswith("torch."):
            raw = raw.optimizer
        states = [v for s in raw.state_dict()["state"].values() for v in s.values() if isinstance(v, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *states]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-3)


def _micro_batches(job: Job) -> list[tuple[int, bool]]:
    """Which number each batch has, and whether the optimizer steps after it."""
    per_epoch = len(job.data) // SIZE
    return [(i, (i + 1) % job.accumulate == 0) for i in range(per_epoch)]


def plain(job: Job) -> Done:
    model = Net(job.dropout)
    optimizer = adam(model)
    watch = None if job.watched is None else Watch(model, optimizer, **job.options())
    if job.resume is not None:
        model.load_state_dict(job.resume["model"])
        optimizer.load_state_dict(job.resume["optimizer"])
        watch.load_state_dict(job.resume["watch"])
    torch.manual_seed(5)
    for _ in range(job.epochs - (job.resume is not None)):
        for (_, steps), batch in zip(_micro_batches(job), job.loader(), strict=True):
            outputs = model(**batch)
            (outputs["loss"] / job.accumulate).backward()
            if not steps:
                if watch is not None:
                    watch.micro_batch(outputs["loss"], batch)
                continue
            if watch is None:
                optimizer.step()
            else:
                watch.step(outputs["loss"], batch=batch, outputs=outputs)
            optimizer.zero_grad()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if watch is not None:
        saved["watch"] = watch.state_dict()
        watch.close()
    return Done(model, optimizer, watch, saved)


def lightning(job: Job) -> Done:
    model = LitNet(job.dropout)
    callbacks = []
    if job.watched is not None:
        callbacks.append(GradWatch(**{"verbose": False, "run_dir": False, **job.options()}))
    trainer = pl.Trainer(
        max_epochs=job.epochs, accumulate_grad_batches=job.accumulate, callbacks=callbacks, default_root_dir=job.folder,
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=job.clip or None, precision="bf16-mixed" if job.bf16 else None,
    )  # fmt: skip
    torch.manual_seed(5)
    trainer.fit(model, job.loader(), ckpt_path=job.resume)
    path = job.folder / "lightning.ckpt"
    trainer.save_checkpoint(path)
    return Done(model, trainer.optimizers[0], callbacks[0] if callbacks else None, path)


def fabric(job: Job) -> Done:
    watch = None if job.watched is None else FabricGradWatch(verbose=False, **job.options())
    fabric = Fabric(
        accelerator="cpu", callbacks=[watch] if watch else None, precision="bf16-mixed" if job.bf16 else None
    )
    inner = Net(job.dropout)
    model, optimizer = fabric.setup(inner, adam(inner))
    state = {"model": model, "optimizer": optimizer} | ({"watch": watch} if watch else {})
    if job.resume is not None:
        fabric.load(job.resume, state)
    fabric.call("watch", optimizer)
    torch.manual_seed(5)
    for _ in range(job.epochs - (job.resume is not None)):
        for (_, steps), batch in zip(_micro_batches(job), job.loader(), strict=True):
            fabric.backward(model(**batch)["loss"] / job.accumulate)
            if steps:
                if job.clip:
                    fabric.call("on_before_optimizer_step", optimizer)
                    fabric.clip_gradients(model, optimizer, max_norm=job.clip, error_if_nonfinite=False)
                optimizer.step()
                optimizer.zero_grad()
    path = job.folder / "fabric.ckpt"
    fabric.save(path, state)
    fabric.call("on_train_end")
    return Done(inner, optimizer, watch, path)


def accelerate(job: Job) -> Done:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=job.accumulate, mixed_precision="bf16" if job.bf16 else None
    )
    inner = Net(job.dropout)
    model, optimizer, loader = accelerator.prepare(inner, adam(inner), job.loader())
    watch = None if job.watched is None else Watch(model, optimizer, **job.options())
    if watch is not None:
        accelerator.register_for_checkpointing(watch)
    if job.resume is not None:
        accelerator.load_state(str(job.resume))
    torch.manual_seed(5)
    for _ in range(job.epochs - (job.resume is not None)):
        for batch in loader:
            with accelerator.accumulate(model):
                outputs = model(**batch)
                accelerator.backward(outputs["loss"])
                if watch is None:
                    optimizer.step()
                else:
                    watch.step(outputs["loss"], batch=batch, outputs=outputs)
                optimizer.zero_grad()
    accelerator.save_state(str(job.folder / "accelerate"))
    if watch is not None:
        watch.close()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return Done(inner, optimizer, watch, job.folder / "accelerate")


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def transformers(job: Job) -> Done:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    model = Net(job.dropout)
    watch = None
    if job.watched is not None:
        watch = GradWatchCallback(**{"verbose": False, "run_dir": False, **job.options()})
    arguments = TrainingArguments(
        output_dir=str(job.folder / "hf"), per_device_train_batch_size=SIZE, num_train_epochs=job.epochs, use_cpu=True,
        gradient_accumulation_steps=job.accumulate, max_grad_norm=job.clip, lr_scheduler_type="constant",
        save_strategy="epoch", report_to="none", disable_tqdm=True, logging_strategy="steps", logging_steps=10,
        bf16=job.bf16, seed=5, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = InOrder(
        model, arguments, train_dataset=job.data, callbacks=[watch] if watch else [], optimizers=(adam(model), None)
    )
    trainer.train(resume_from_checkpoint=job.resume)
    steps = trainer.state.global_step
    saved = str(job.folder / "hf" / f"checkpoint-{steps}")
    return Done(model, trainer.optimizer, watch, saved, {"log": trainer.state.log_history})


ADAPTERS: dict[str, Callable[[Job], Done]] = {
    "plain": plain,
    "lightning": lightning,
    "fabric": fabric,
    "accelerate": accelerate,
    "transformers": transformers,
}
