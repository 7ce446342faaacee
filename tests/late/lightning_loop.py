"""Lightning on the late device, through an accelerator of its kind. Imported late: Lightning takes seconds."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import Accelerator, CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from gradwatch.callbacks import GradWatch

from .loops import faults, net
from .places import Place
from .story import Story


class LateAccelerator(Accelerator):
    """What Lightning asks of a kind of device."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing is to be set up."""

    def teardown(self) -> None:
        """Nothing is to be torn down."""

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("late:0")]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "late"


class Task(pl.LightningModule):
    """A few layers; the loss of some steps is multiplied by something."""

    def __init__(self, place: Place, at: dict[int, float], optimizer: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.factor, self.place, self.make = net(), faults(at), place, optimizer

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y) * self.factor(self.trainer.global_step)

    def on_train_batch_end(self, *_: Any) -> None:
        self.place.tick()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


def trained(
    place: Place, steps: int, at: dict[int, float], optimizer: Any, accumulate: int = 1, **options: Any
) -> Story:
    """Train under Lightning and tell of it."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    task = Task(place, at, optimizer)
    torch.manual_seed(1)
    data = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(4)]
    callback = GradWatch(activations_every=None, updates_every=None, histograms_every=None, run_dir=False, **options)
    device = place.device
    accelerator: Any = CPUAccelerator() if device.type == "cpu" else LateAccelerator()
    trainer = pl.Trainer(
        strategy=SingleDeviceStrategy(device=device, accelerator=accelerator),
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    end = ""
    try:
        trainer.fit(task, torch.utils.data.DataLoader(data, batch_size=None))
    except Exception as error:
        end = f"{type(error).__name__}: {error}"
    return Story(
        incidents=callback.incidents,
        records=list(callback.history),
        end=end,
        weights=[p.detach().cpu().numpy() for p in task.parameters()],
    )
