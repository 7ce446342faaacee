"""Lightning: automatic optimization with validation, manual optimization of two optimizers, Fabric."""

from __future__ import annotations

import logging

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from .data import batches, digits, generator
from .generative import GAN
from .street import Street, program
from .vision import resnet


class Noted(pl.Callback):
    """Hands the losses to the street."""

    def __init__(self, street: Street) -> None:
        self.street = street

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        self.street.note(*module.losses)
        module.losses = []


def fit(street: Street, module: pl.LightningModule, **options):
    images, labels = digits()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    train = DataLoader(TensorDataset(images[:1500], labels[:1500]), 32, shuffle=True, generator=generator())
    held = DataLoader(TensorDataset(images[1500:], labels[1500:]), 100)
    trainer = pl.Trainer(
        max_steps=street.steps * options.pop("per_batch", 1),
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*street.lightning(), Noted(street)],
        **options,
    )
    trainer.fit(module, train, held)
    optimizers = trainer.optimizers
    module.trainer = None  # which holds its callbacks
    return module, *optimizers


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = resnet()
        self.losses: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=300)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@program(steps=55)
def lightning_automatic(street: Street):
    """Accumulation of two, the Trainer's clip, bf16 autocast, validation twice an epoch."""
    return fit(
        street,
        Classifier(),
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        precision="bf16-mixed",
        val_check_interval=0.5,
    )


class ManualGAN(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.gan = GAN()
        self.losses: list[Tensor] = []

    def configure_optimizers(self):
        return [
            torch.optim.Adam(self.gan.generator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
            torch.optim.Adam(self.gan.critic.parameters(), lr=5e-4, betas=(0.5, 0.999)),
        ]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x = batch[0].flatten(1)
        of_generator, of_critic = self.optimizers()
        self.toggle_optimizer(of_critic)
        fake = self.gan.generator(torch.randn(len(x), 8)).detach()
        loss_critic = F.softplus(-self.gan.critic(x)).mean() + F.softplus(self.gan.critic(fake)).mean()
        of_critic.zero_grad()
        self.manual_backward(loss_critic)
        self.clip_gradients(of_critic, gradient_clip_val=5.0, gradient_clip_algorithm="norm")
        of_critic.step()
        self.untoggle_optimizer(of_critic)
        self.toggle_optimizer(of_generator)
        loss_generator = F.softplus(-self.gan.critic(self.gan.generator(torch.randn(len(x), 8)))).mean()
        of_generator.zero_grad()
        self.manual_backward(loss_generator)
        of_generator.step()
        self.untoggle_optimizer(of_generator)
        self.losses += [loss_critic.detach(), loss_generator.detach()]


@program(steps=55)
def lightning_manual(street: Street):
    """Two optimizers in turns with toggling, and a clip of one of them."""
    return fit(street, ManualGAN(), per_batch=2, limit_val_batches=0)


@program(steps=55)
def fabric(street: Street):
    """A loop of one's own under Fabric: bf16, `no_backward_sync`, its clip; nothing in it knows of a watch."""
    images, labels = digits()
    runner = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed", callbacks=street.fabric())
    net = resnet()
    model, optimizer = runner.setup(net, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9))
    for i, (x, y) in enumerate(batches(images, labels, size=16, steps=2 * street.steps)):
        accumulates = i % 2 == 0
        with runner.no_backward_sync(model, enabled=accumulates):
            loss = nn.functional.cross_entropy(model(x), y)
            runner.backward(loss / 2)
        if not accumulates:
            runner.clip_gradients(model, optimizer, max_norm=5.0)
            optimizer.step()
            optimizer.zero_grad()
            street.note(loss)
    runner.call("on_train_end")
    return net, optimizer.optimizer
