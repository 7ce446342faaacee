"""The ordinary training loop, watched."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.random import RandomState
from torch import Tensor, nn
from torch.optim import Optimizer

from ._program import Problem, Program

__all__ = ["Run", "Unwatched", "batches", "run", "train"]

MakeWatch = Callable[..., Any]


@dataclass(frozen=True)
class Run:
    """How one training ended, and what was said of it.

    Attributes:
        program, faulty, seed: what was trained.
        metric: on the validation data, at the end.
        is_finite: the losses were, all of them, and the outputs at the end.
        alarms: rule -> first step, of incidents of severity warning or above.
        remarks: the same for incidents of severity info.
        seconds: of training, watching included.
    """

    program: str
    faulty: bool
    seed: int
    metric: float
    is_finite: bool
    alarms: dict[str, int] = field(default_factory=dict)
    remarks: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class Unwatched:
    """Stands in for a watch: steps the optimizers and looks at nothing."""

    incidents = ()

    def __init__(self, model: nn.Module, optimizer: Optimizer | list[Optimizer]) -> None:
        self.optimizers = optimizer if isinstance(optimizer, list) else [optimizer]

    def step(self, **_: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def validation(self, **_: Any) -> None: ...

    def annotate(self, *_: Any, **__: Any) -> None: ...

    def close(self) -> None: ...


def run(program: Program, seed: int, *, faulty: bool, make_watch: MakeWatch = Unwatched) -> Run:
    """Train one program and return how it ended."""
    problem = program.make(seed, faulty=faulty)
    watches: list[Any] = []

    def watch_of(model: nn.Module, optimizer: Optimizer | list[Optimizer]) -> Any:
        watches.append(make_watch(model, optimizer))
        return watches[-1]

    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if problem.fit is not None:
            metric, is_finite = problem.fit(watch_of, problem), True
        else:
            metric, is_finite = train(problem, seed, watch_of)
        for watch in watches:
            watch.close()
    seconds = time.perf_counter() - begun
    alarms, remarks = _said(watches)
    return Run(program.name, faulty, seed, metric, is_finite, alarms, remarks, seconds)


def train(problem: Problem, seed: int, watch_of: MakeWatch) -> tuple[float, bool]:
    """Train as a user would, and return the validation metric and whether all losses were finite."""
    model = problem.model
    optimizer = problem.optimizer(model)
    schedule = problem.schedule(optimizer) if problem.schedule else None
    watch = watch_of(model, optimizer)
    stream = batches(problem, seed)
    validate_every = max(problem.steps // 20, 1)
    is_finite = True
    for step in range(problem.steps):
        if problem.before_step:
            problem.before_step(step, watch)
        for _ in range(problem.accumulate):
            x, y = next(stream)
            outputs = model(x)
            loss = problem.loss(outputs, y)
            if not loss.requires_grad:
                # What users of a model that is frozen by mistake are told to do, to silence the error of backward().
                loss.requires_grad_()
            (loss / problem.accumulate).backward()
        watch.step(loss=loss, batch=x, outputs=outputs, targets=y)
        if problem.zero_grad:
            optimizer.zero_grad()
        if schedule:
            schedule.step()
        is_finite = is_finite and bool(torch.isfinite(loss.detach()))
        if problem.has_validation and (step + 1) % validate_every == 0:
            watch.validation(loss=_validate(problem)[0])
    _, metric, finite_outputs = _validate(problem)
    return metric, is_finite and finite_outputs


def batches(problem: Problem, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    x, y, _, _ = problem.data
    if problem.batches is not None:
        random, step = RandomState(seed), 0
        while True:
            chosen = torch.as_tensor(problem.batches(step, random))
            yield x[chosen], y[chosen]
            step += 1
    random = torch.Generator().manual_seed(seed)
    size = min(problem.batch_size, len(x))
    while True:
        order = torch.randperm(len(x), generator=random)
        for start in range(0, len(x) - size + 1, size):
            chosen = order[start : start + size]
            yield x[chosen], y[chosen]


@torch.no_grad()
def _validate(problem: Problem) -> tuple[float, float, bool]:
    """Return loss, metric, and whether the outputs are finite, in eval mode."""
    _, _, x, y = problem.data
    problem.model.eval()
    outputs = problem.model(x)
    problem.model.train()
    metric = -1.0
    with suppress(ValueError):
        metric = problem.metric(outputs, y)
    return problem.loss(outputs, y).item(), metric, bool(torch.isfinite(outputs).all())


def _said(watches: list[Any]) -> tuple[dict[str, int], dict[str, int]]:
    alarms: dict[str, int] = {}
    remarks: dict[str, int] = {}
    for watch in watches:
        for incident in watch.incidents:
            said = remarks if incident.severity == "info" else alarms
            said[incident.rule] = min(incident.first_step, said.get(incident.rule, incident.first_step))
    return alarms, remarks
