"""Ten bad batches in a hundred: these steps are skipped and no others, and the rest trains as if they had not been."""

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from gradwatch.callbacks import GradWatch
from tests.modes.lightning_cases import Module, loader
from tests.modes.reference import Net, batches, loss_of, sgd

STEPS = 100
BAD = (0, 7, 8, 23, 41, 42, 43, 66, 89, 99)


class Scheduled(Module):
    """With a rate that changes at every step, and a note of what it was."""

    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.net)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler, "interval": "step"}}


def by_hand() -> tuple[Net, float]:
    """Train without the bad batches. The schedule counts them: a skipped step is a step."""
    net = Net()
    optimizer = sgd(net)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)
    for step, (pair,) in enumerate(batches(1, STEPS)):
        if step not in BAD:
            optimizer.zero_grad()
            loss_of(net, pair).backward()
            optimizer.step()
        scheduler.step()
    return net, scheduler.get_last_lr()[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_lightning_skips_the_ten_bad_batches_of_a_hundred_and_trains_on_the_others_alone(tmp_path: Path) -> None:
    watch = GradWatch(rules="autoclip", verbose=False, on_error="raise", run_dir=False)
    module = Scheduled(Net(), 0, bad=dict.fromkeys(BAD, 0))
    run = pl.Trainer(
        callbacks=[watch],
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    run.fit(module, loader(batches(1, STEPS), 0))
    assert tuple(r.step for r in watch.history if r.skipped) == BAD
    assert [math.isfinite(r.global_norm) for r in watch.history] == [step not in BAD for step in range(STEPS)]
    # Nothing else was touched, or the bits below could not be the same.
    assert not any(t.applied for r in watch.history if not r.skipped for t in r.treatments)
    twin, rate = by_hand()
    assert all(torch.equal(p, q) for p, q in zip(module.net.parameters(), twin.parameters(), strict=True))
    # Skipped steps count: for `global_step`, and for a schedule by steps.
    assert run.global_step == STEPS
    assert module.scheduler.get_last_lr()[0] == rate
