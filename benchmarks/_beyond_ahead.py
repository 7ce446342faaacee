"""How long before the loss doubles the rules of the preset `ahead` speak, and how often they speak in healthy runs."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwatch import Watch
from gradwatch.ahead import WeightSpectra, sharpness
from gradwatch.stats import View

__all__ = ["rows"]

Make = Callable[[Any, float], torch.optim.Optimizer]

OPTIMIZERS: dict[str, tuple[Make, float]] = {
    "SGD": (torch.optim.SGD, 0.05),
    "momentum .9": (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), 0.01),
    "Nesterov .9": (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True), 0.01),
    "Adam": (torch.optim.Adam, 2e-3),
    "RMSprop": (torch.optim.RMSprop, 5e-4),
    "AdamW": (lambda p, lr: torch.optim.AdamW(p, lr, betas=(0.9, 0.95), weight_decay=0.1), 2e-3),
}
"""With a healthy learning rate for `_run`."""
BEGINS, DOUBLES_IN, WHOLE = 300, 60, 256


Batch = tuple[Tensor, Tensor]


@dataclass
class Task:
    """A net, batches drawn anew or from a set, and what they come to."""

    model: nn.Module
    draw: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]


def _mse(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def teacher() -> Task:
    """A net of 5,600 parameters follows another, with noise."""
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    other = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 1))

    def draw(n: int) -> Batch:
        x = torch.randn(n, 20)
        with torch.no_grad():
            return x, other(x) + 0.1 * torch.randn(n, 1)

    return Task(model, draw, _mse)


def _of_set(x: Tensor, y: Tensor) -> Callable[[int], Batch]:
    def draw(n: int) -> Batch:
        chosen = torch.randint(0, len(x), (n,))
        return x[chosen], y[chosen]

    return draw


def classes() -> Task:
    """Four classes of 500 points, learnt by heart."""
    x = torch.randn(500, 30)
    y = (x[:, :5] @ torch.randn(5, 4) + 0.3 * torch.randn(500, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    return Task(model, _of_set(x, y), _cross_entropy)


def images() -> Task:
    """Five patterns under noise, convolutions with batch normalisation."""
    y = torch.randint(0, 5, (400,))
    x = torch.randn(400, 1, 12, 12) + 0.4 * torch.randn(5, 1, 12, 12)[y]
    first = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    second = nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU()
    return Task(nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(256, 5)), _of_set(x, y), _cross_entropy)


class _Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(32, 32), nn.Parameter(0.02 * torch.randn(16, 32))
        layer = [nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True, norm_first=True) for _ in range(3)]
        self.blocks, self.head = nn.ModuleList(layer), nn.Linear(32, 32)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.head(x)


def text() -> Task:
    """A transformer of three blocks on sequences in which each token follows from the two before, or from nothing."""
    table = torch.randint(0, 32, (32,))

    def draw(n: int) -> Batch:
        x = torch.randint(0, 32, (n // 2, 17))
        for i in range(2, 17):
            follows = torch.rand(len(x)) > 0.2
            x[:, i] = torch.where(follows, (table[x[:, i - 1]] + x[:, i - 2]) % 32, x[:, i])
        return x[:, :-1], x[:, 1:]

    return Task(_Text(), draw, _cross_entropy)


TASKS = {"regression": teacher, "classes": classes, "images": images, "text": text}


def _run(
    name: str, steps: int, *, seed: int, ramp: bool, whole: bool = False, rules: str = "ahead", task: str = "regression"
) -> tuple[Watch, list[float], float]:
    """Train a small net. With a ramp the learning rate doubles every so many steps from some step on; with the whole
    data set as one batch the sharpness is measured at every tenth step from 200 on."""
    torch.manual_seed(seed)
    make, rate = OPTIMIZERS[name]
    made = TASKS[task]()
    model = made.model
    optimizer, losses, fixed = make(model.parameters(), rate), [], made.draw(WHOLE)
    options: dict[str, Any] = {"activations_every": 50, "updates_every": None, "histograms_every": None}
    begun = time.process_time()
    with Watch(model, optimizer, rules=rules, **options) as watch:
        for step in range(steps):
            if ramp and step >= BEGINS:
                optimizer.param_groups[0]["lr"] = rate * 2 ** ((step - BEGINS) / DOUBLES_IN)
            batch = fixed if whole else made.draw(32)
            if whole and step % 10 == 0 and step >= 200:
                watch.record(**sharpness(model, made.loss, batch, optimizer=optimizer, iterations=10).scalars)
            optimizer.zero_grad()
            loss = made.loss(model, batch)
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


def leads(name: str, seeds: int, *, whole: bool, task: str = "regression") -> list[int | None]:
    """Return the steps between the first alarm of the ramp and the doubling; None where there was no alarm."""
    found: list[int | None] = []
    for seed in range(seeds):
        watch, losses, _ = _run(name, 900, seed=seed, ramp=True, whole=whole, task=task)
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
    for task in ("classes", "images"):
        known = [lead for name in OPTIMIZERS for lead in leads(name, 1, whole=False, task=task)]
        early = sum(lead is not None and lead >= 10 for lead in known)
        yield (
            f"ahead: {task}, a run that comes to that with each optimizer: alarm before the loss doubles",
            f"{early} of {len(known)}",
            "",
        )
    total = total_steps = 0
    for task in TASKS:
        alarms, steps = _false_alarms(task)
        total, total_steps = total + sum(alarms.values()), total_steps + steps
        named = ", ".join(f"{rule} {count}" for rule, count in alarms.items())
        yield (
            f"ahead: false alarms in healthy runs, {task}",
            f"{sum(alarms.values())} in {steps:,} steps{f' ({named})' if named else ''}",
            "",
        )
    yield "ahead: false alarms in all healthy runs", f"{total} in {total_steps:,} steps", "1 in 10,000"
    yield from _plasticity()
    yield from _residual()
    yield from _costs()
    yield from _spectra()


def _false_alarms(task: str) -> tuple[Counter[str], int]:
    alarms: Counter[str] = Counter()
    steps = 0
    for number, name in enumerate(OPTIMIZERS):
        watch, losses, _ = _run(name, 1000 if task == "text" else 2000, seed=100 + number, ramp=False, task=task)
        alarms.update(incident.name for incident in watch.incidents)
        steps += len(losses)
    return alarms, steps


def _plasticity() -> Iterator[tuple[str, str, str]]:
    """Yield when `dormant_units_growing` speaks, where a net learns new labels of the same points again and again."""
    every = 300
    for rate, asked in ((1e-2, "a finding"), (1e-3, "none")):
        torch.manual_seed(0)
        layers = nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        model, x, y = nn.Sequential(*layers), torch.randn(512, 20), torch.zeros(512)
        optimizer, left, dormant = torch.optim.Adam(model.parameters(), rate), [], []
        with Watch(model, optimizer, rules=["ahead"], updates_every=None, histograms_every=None) as watch:
            for step in range(8 * every):
                if step % every == 0:
                    y = torch.randint(0, 10, (512,))
                chosen = torch.randint(0, 512, (64,))
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[chosen]), y[chosen])
                loss.backward()
                watch.step(loss=loss)
                if step % every == every - 1:
                    left.append(loss.item())
                    dormant.append(next(r for r in reversed(watch.history) if "dormant_fraction" in r.columns))
        told = [i.first_step for i in watch.incidents if i.name == "dormant_units_growing"]
        shares = ", ".join(f"{record['dormant_fraction', '3']:.2f}" for record in dormant)
        losses = ", ".join(f"{value:.2g}" for value in left)
        found = f"{f'step {told[0]}' if told else 'none'}; loss left {losses}; dormant {shares}"
        yield f"ahead: new labels every {every} steps, Adam at {rate:g}: dormant_units_growing", found, asked


class _Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


def _residual() -> Iterator[tuple[str, str, str]]:
    """Yield when `residual_growing` speaks on the ramp, and when the loss is a tenth above its level."""
    for ramp in (True, False):
        found = []
        for seed in range(3):
            torch.manual_seed(seed)
            blocks = [_Branch() for _ in range(6)]
            model = nn.Sequential(nn.Linear(16, 32), nn.Sequential(*blocks), nn.LayerNorm(32), nn.Linear(32, 10))
            other = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
            optimizer, losses = torch.optim.Adam(model.parameters(), 1e-3), []
            with Watch(model, optimizer, rules=["ahead"], activations_every=10, updates_every=None) as watch:
                for step in range(800):
                    if ramp and step >= BEGINS:
                        optimizer.param_groups[0]["lr"] = 1e-3 * 2 ** ((step - BEGINS) / DOUBLES_IN)
                    x = torch.randn(64, 16)
                    with torch.no_grad():
                        y = (3 * other(x)).softmax(1).multinomial(1)[:, 0]
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(x), y)
                    loss.backward()
                    watch.step(loss=loss)
                    losses.append(loss.item())
            smooth = [np.median(losses[max(0, i - 10) : i + 1]) for i in range(len(losses))]
            below = np.flatnonzero(np.array(smooth) <= 1.1 * np.median(losses[BEGINS - 100 : BEGINS]))
            worse = int(below[-1]) + 1
            told = [i.first_step for i in watch.incidents if i.name == "residual_growing"]
            found.append(f"{told[0] if told else 'none'}" + (f" (loss up at {worse})" if worse < len(losses) else ""))
        what = "ramp" if ramp else "healthy"
        yield f"ahead: six residual blocks, {what}: residual_growing at step", "; ".join(found), ""


def _costs() -> Iterator[tuple[str, str, str]]:
    pairs = [[_run("Adam", 200, seed=0, ramp=False, rules=r)[2] for r in ("observe", "ahead")] for _ in range(5)]
    more = statistics.median(b - a for a, b in pairs) / 200
    yield "ahead: cost of the preset, a net of 5,600 parameters", f"{more * 1e3:.2f} ms a step", "-"
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256), nn.GELU()) for _ in range(16)]
    model = nn.Sequential(nn.Linear(16, 256), *layers, nn.Linear(256, 4))
    given = torch.randn(64, 16)
    usual = statistics.median(_seconds(model, given, None)[20:])
    for name in ("gradient_turn", "step_curvature", "adam_update_rms"):
        more = statistics.median(_seconds(model, given, name)[20:]) - usual
        yield f"ahead: cost of {name}, 68 parameters, 1.1 M entries", f"{more * 1e3:.1f} ms a step", "-"
    for name in ("weight_spectra", "dormant_units", "effective_rank"):
        spent = _seconds(model, given, {name: {"every": 4}})
        more = statistics.median(spent[20::4]) - usual
        yield f"ahead: cost of {name}, where it measures", f"{more * 1e3:.1f} ms, {more / usual:.1f} steps", "-"


def _seconds(model: nn.Module, given: Tensor, statistic: Any) -> list[float]:
    optimizer, spent = torch.optim.Adam(model.parameters(), 1e-4), []
    options: dict[str, Any] = {"activations_every": None, "updates_every": None, "histograms_every": None}
    with Watch(model, optimizer, rules="observe", statistics=[statistic] if statistic else (), **options) as watch:
        for _ in range(120):
            begun = time.process_time()
            optimizer.zero_grad()
            loss = model(given).square().mean()
            loss.backward()
            watch.step(loss=loss)
            spent.append(time.process_time() - begun)
    return spent


def _spectra() -> Iterator[tuple[str, str, str]]:
    """Yield how far the spectral norm is from the exact one, at most, over weights of many shapes."""
    torch.manual_seed(0)
    off, statistic = [], WeightSpectra()
    for rows, columns in ((64, 64), (256, 256), (1000, 1000), (768, 3072), (2000, 50), (10, 784)):
        for trained in (False, True):
            weight = torch.randn(rows, columns)
            weight += 3 * torch.outer(torch.randn(rows), torch.randn(columns)) * trained
            view = View(0, ("weight",), {}, tensors={"parameters": lambda w=weight: [w]})
            found = statistic.finish(statistic.sums(view).numpy(), np.zeros((1, 0)))["spectral_norm"][0]
            off.append(abs(found / torch.linalg.matrix_norm(weight.double(), 2).item() - 1))
    yield "ahead: spectral norm, 12 weights, farthest from the exact one", f"{max(off):.2%}", "1 %"
