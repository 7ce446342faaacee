"""How long before the loss doubles the rules of the preset `ahead` speak, and how often they speak in healthy runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwatch import Watch
from gradwatch.ahead import sharpness

__all__ = ["rows"]

Make = Callable[[Any, float], torch.optim.Optimizer]

OPTIMIZERS: dict[str, tuple[Make, float]] = {
    "SGD": (torch.optim.SGD, 0.05),
    "momentum .9": (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), 0.01),
    "Nesterov .9": (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True), 0.01),
    "Adam": (torch.optim.Adam, 2e-3),
    "RMSprop": (torch.optim.RMSprop, 5e-4),
}
"""With a healthy learning rate for `_run`."""
BEGINS, DOUBLES_IN, WHOLE = 300, 60, 256


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def _run(
    name: str, steps: int, *, seed: int, ramp: bool, whole: bool = False, rules: str = "ahead"
) -> tuple[Watch, list[float], float]:
    """Train a small net to follow another. With a ramp the learning rate doubles every so many steps from some step on;
    with the whole data set as one batch the sharpness is measured at every tenth step from 200 on."""
    torch.manual_seed(seed)
    make, rate = OPTIMIZERS[name]
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    teacher = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 1))

    def draw(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 20)
        with torch.no_grad():
            return x, teacher(x) + 0.1 * torch.randn(n, 1)

    optimizer, losses, fixed = make(model.parameters(), rate), [], draw(WHOLE)
    options: dict[str, Any] = {"activations_every": None, "updates_every": None, "histograms_every": None}
    begun = time.process_time()
    with Watch(model, optimizer, rules=rules, **options) as watch:
        for step in range(steps):
            if ramp and step >= BEGINS:
                optimizer.param_groups[0]["lr"] = rate * 2 ** ((step - BEGINS) / DOUBLES_IN)
            batch = fixed if whole else draw(32)
            if whole and step % 10 == 0 and step >= 200:
                watch.record(**sharpness(model, _loss, batch, optimizer=optimizer, iterations=10).scalars)
            optimizer.zero_grad()
            loss = _loss(model, batch)
            loss.backward()
            watch.step(loss=loss)
            losses.append(loss.item())
            if not losses[-1] < 10 * max(losses[:10]):
                break
    return watch, losses, time.process_time() - begun


def _doubled(losses: Sequence[float], window: int) -> int | None:
    """Return the step from which on the loss (median of a window) is twice its level before the ramp, and stays."""
    values = np.asarray(losses)
    level = np.median(values[BEGINS - 100 : BEGINS])
    smooth = np.array([np.median(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))])
    first = int(np.flatnonzero(smooth <= 2 * level)[-1]) + 1
    return first if first < len(values) else None


def leads(name: str, seeds: int, *, whole: bool) -> list[int | None]:
    """Return the steps between the first alarm of the ramp and the doubling; None where there was no alarm."""
    found: list[int | None] = []
    for seed in range(seeds):
        watch, losses, _ = _run(name, 900, seed=seed, ramp=True, whole=whole)
        # One that was told of before, and goes on, is told of when the ramp begins.
        told = [max(i.first_step, BEGINS) for i in watch.incidents if i.last_step >= BEGINS]
        doubled = _doubled(losses, 1 if whole else 11)
        if doubled is not None:
            found.append(doubled - min(told) if told and min(told) < doubled else None)
    return found


def rows(seeds: int = 3) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the table: what, found, asked for."""
    torch.set_num_threads(1)
    for whole, of in ((False, "batches of 32"), (True, "the whole data set as one, sharpness recorded")):
        for name in OPTIMIZERS:
            found = leads(name, 1 if whole else seeds, whole=whole)
            known = [lead for lead in found if lead is not None]
            early = sum(lead >= 10 for lead in known)
            median = f"median {statistics.median(known):.0f} steps" if known else "no alarm"
            yield (
                f"ahead: {name}, {of}: alarm before the loss doubles",
                f"{early} of {len(found)}; {median}",
                "10 steps",
            )
    alarms = steps = 0
    for number, name in enumerate(OPTIMIZERS):
        watch, losses, _ = _run(name, 2000, seed=100 + number, ramp=False)
        alarms, steps = alarms + len(watch.incidents), steps + len(losses)
    yield "ahead: false alarms in healthy runs, batches of 32", f"{alarms} in {steps:,} steps", "1 in 10,000"
    pairs = [[_run("Adam", 200, seed=0, ramp=False, rules=r)[2] for r in ("observe", "ahead")] for _ in range(5)]
    more = statistics.median(b - a for a, b in pairs) / 200
    yield "ahead: cost, a net of 5,600 parameters", f"{more * 1e3:.2f} ms a step", "-"
