"""Faulty programs, tried again with one change each: does the change that wins name the fault that was planted?

The programs of `fault_programs` whose fault a change can express; and, where the environment variable
`GRADWATCH_FAULTS2` names the folder of a second set of programs, those of it. Each trains for `AT` steps, or until
just before anything is not finite, and what it would train on next is handed to `gradwatch.what_if`. Which changes name
which fault stands in the tables below, from what the faults are. Everything is compared before and after, bit for bit.
"""

from __future__ import annotations

import copy
import importlib
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fault_programs import PROGRAMS, batches
from torch import Tensor, nn

import gradwatch

__all__ = ["rows"]

AT, STEPS, BEFORE = 60, 40, 6
"""Steps before the question, steps of each change, and steps before the first that is not finite."""

NEW, RELU, RATE = "initialised again", "ReLU between the layers", "learning rate"
HIGHER, LOWER = (f"{RATE} x 10", f"{RATE} x 100"), (f"{RATE} / 10", f"{RATE} / 100")
ENDS = ("no activation at the end", "sigmoid activation at the end", "softmax activation at the end")
MAIN, PLAIN, ROLLED = "main term of the loss alone", "a plain step", ("rows re-aligned by +1", "rows re-aligned by -1")
ATTACHED, LOGITS = "nothing detached", "logits for the loss"

NAMES: dict[str, tuple[str, ...]] = {
    "vanishing": (RELU, NEW),
    "exploding": (RELU, NEW, *LOWER),
    "dead": (NEW, RELU),
    "hidden_activation": (RELU,),
    "initialisation": (NEW,),
    "symmetry": (NEW,),
    "learning_rate_high": LOWER,
    "learning_rate_low": HIGHER,
    "oscillation": LOWER,
    "regularisation": ("weight decay 0", "no dropout"),
    "epsilon": ("epsilon 1e-08",),
    "output_activation": (*ENDS, LOGITS),
    "softmax_on_one_unit": (*ENDS, LOGITS),
    "wrong_loss": ("cross-entropy for classes",),
    "loss_sign": ("loss negated",),
    "loss_reduction": ("loss averaged",),
    "shape_broadcast": ("targets in the outputs' shape",),
    "unnormalised_input": ("normalised inputs",),
    "tiny_input": ("normalised inputs",),
    "unscaled_targets": ("scaled targets",),
    "gradients_kept": (PLAIN,),
    "frozen": ("all parameters unfrozen",),
    "stale_optimizer": ("all parameters in the optimizer",),
    "detached": (ATTACHED,),
}
"""Fault of `fault_programs` -> changes that name it; a fault that is missing can't be expressed."""

SECOND: dict[str, tuple[str, ...]] = {
    "clip_pairs_off": ROLLED,
    "clip_tower_no_grad": (ATTACHED,),
    "cnn_bn_stats": ("batch normalisation's momentum 0.1",),
    "cnn_eval_mode": ("train mode",),
    "cnn_lr_low": HIGHER,
    "cnn_lr_x60": LOWER,
    "cnn_sched_per_batch": (f"{RATE} as at first",),
    "cnn_sum_loss": ("loss averaged",),
    "cnn_wd_huge": ("weight decay 0",),
    "dqn_broadcast": ("targets in the outputs' shape",),
    "dqn_reward_1e4": ("scaled targets",),
    "gnn_dead_bias": (NEW,),
    "gnn_wd": ("weight decay 0",),
    "gpt_adam_eps": ("epsilon 1e-08",),
    "gpt_bf16": ("weights in float32",),
    "gpt_ema_into_weights": (PLAIN,),
    "gpt_init_std1": (NEW,),
    "gpt_shift_2": ("targets shifted by +1",),
    "gpt_zero_before_step": (PLAIN,),
    "moe_balance_huge": (MAIN,),
    "moe_collapse": (NEW,),
    "moe_experts_stale": ("all parameters in the optimizer",),
    "moe_no_gate_grad": (ATTACHED,),
    "tab_nan_rows": ("finite inputs", "without the worst batch"),
    "tab_relu_out": ENDS,
    "tab_target_outliers": ("robust loss", "without the worst batch"),
    "vae_double_sigmoid": (LOGITS,),
    "vae_kl_dominates": ("loss summed over a sample", MAIN),
    "vae_kl_sign": (MAIN,),
}
"""Fault of the second set -> changes that name it."""


@dataclass
class Question:
    """A training at the time that it is asked about."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: Callable[..., Tensor]
    batches: list[Any]
    clip: float | None = None
    train_step: Callable[..., Any] | None = None


class Loop:
    """A program's own loop, step by step.

    Attributes:
        question: what is asked about it, with the batches that come next.
    """

    def step(self) -> float:
        """Take a step; return its loss."""
        raise NotImplementedError

    def question(self, count: int) -> Question:
        raise NotImplementedError


class Published(Loop):
    """Of `fault_programs`."""

    def __init__(self, name: str, seed: int, *, faulty: bool) -> None:
        self.problem = problem = PROGRAMS[name].make(seed, faulty=faulty)
        self.optimizer = problem.optimizer(problem.model)
        self.schedule = problem.schedule(self.optimizer) if problem.schedule else None
        self.stream = batches(problem, seed)

    def step(self) -> float:
        if self.problem.before_step:
            self.problem.before_step(0, None)
        loss = self._train(self.problem.model, self.optimizer, next(self.stream))
        if self.schedule:
            self.schedule.step()
        return float(loss.detach())

    def _train(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> Tensor:
        loss = self.problem.loss(model(batch[0]), batch[1])
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        if self.problem.zero_grad:
            optimizer.zero_grad()
        return loss

    def question(self, count: int) -> Question:
        problem = self.problem
        return Question(
            problem.model,
            self.optimizer,
            lambda outputs, targets: problem.loss(outputs, targets),
            [next(self.stream) for _ in range(count)],
            train_step=self._train,
        )


class Second(Loop):
    """Of the second set."""

    def __init__(self, name: str, seed: int, *, faulty: bool) -> None:
        faults, programs = importlib.import_module("faults"), importlib.import_module("programs")
        programs.load()
        faults.load()
        self.program = programs.REG[faults.FAULTS[name].program](seed)
        if faulty:
            faults.FAULTS[name].change(self.program)
        self.program.setup()
        self.number = 0
        self.is_lightning = self.program.kind == "lightning"
        self.stream = self._loaded() if self.is_lightning else iter(lambda: self.program.batch(self.number), None)

    def _loaded(self) -> Iterator[Any]:
        loader, _ = self.program.loaders()
        while True:
            yield from loader
            if self.program.sched is not None and self.program.interval == "epoch":
                self.program.sched.step()

    def step(self) -> float:
        program = self.program
        if not self.is_lightning:
            program.one_step(self.number, _Nobody())
            self.number += 1
            return float(program.losses[-1])
        program.set_mode()
        loss = self._loss(program.model, next(self.stream))
        program.opt.zero_grad()
        loss.backward()
        if program.clip:
            nn.utils.clip_grad_norm_(program.model.parameters(), program.clip)
        program.opt.step()
        if program.sched is not None and program.interval == "step":
            program.sched.step()
        return float(loss.detach())

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.program.set_mode()
        return self.program.forward(self.program.augment(batch) if self.is_lightning else batch)[2]

    def _train(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> Tensor:
        """Take the program's step with another optimizer."""
        program, own = self.program, self.program.opt
        program.opt = optimizer
        try:
            loss = self._loss(model, batch)
            program.backward(loss)
            program.before_step(self.number)
            if program.clip:
                nn.utils.clip_grad_norm_(model.parameters(), program.clip)
            optimizer.step()
            program.after_step(self.number)
            program.zero()
        finally:
            program.opt = own
        return loss

    def question(self, count: int) -> Question:
        program = self.program
        found = [next(self.stream) for _ in range(count)]
        own_step = None if self.is_lightning else self._train
        return Question(program.model, program.opt, self._loss_of, found, program.clip, own_step)

    def _loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        return self._loss(model, batch)


class _Nobody:
    """Stands where a watch would."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def asked(make: Callable[[], Loop], at: int = AT) -> Loop:
    """Return the loop at the time of the question: before anything is not finite."""
    loop = make()
    for step in range(at):
        if not math.isfinite(loop.step()) or not _is_finite(loop):
            return asked(make, max(0, step - BEFORE)) if step else make()
    return loop


def _is_finite(loop: Loop) -> bool:
    model = loop.problem.model if isinstance(loop, Published) else loop.program.model  # type: ignore[attr-defined]
    return all(bool(p.isfinite().all()) for p in model.parameters())


def everything(question: Question) -> dict[str, Any]:
    """Return copies of all that must be the same afterwards."""
    model, optimizer = question.model, question.optimizer
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        "tensors": {name: t.detach().clone() for name, t in named},
        "versions": {name: t._version for name, t in named},
        "identities": {name: id(t) for name, t in named},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "modes": {name: (m.training, sorted(vars(m))) for name, m in model.named_modules()},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "batches": copy.deepcopy(question.batches),
        "random": [torch.get_rng_state(), np.random.get_state(), random.getstate()],
    }


def same(a: Any, b: Any) -> bool:
    """Return whether two trees are equal, bit for bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@dataclass
class Answer:
    """What was said of one program."""

    name: str
    found: Any
    is_right: bool
    is_restored: bool
    seconds: float
    error: str = ""


def answer(name: str, make: Callable[[], Loop], accepted: tuple[str, ...]) -> Answer:
    begun = time.perf_counter()
    question = asked(make).question(STEPS + 8)
    before = everything(question)
    try:
        found = gradwatch.what_if(
            question.model,
            question.optimizer,
            question.loss_fn,
            question.batches,
            steps=STEPS,
            seconds=900,
            clip=question.clip,
            train_step=question.train_step,
        )
    except Exception as error:
        return Answer(name, None, False, same(before, everything(question)), time.perf_counter() - begun, repr(error))
    restored = same(before, everything(question))
    won = found.winner
    right = won is not None and won.name in accepted
    return Answer(name, found, right, restored, time.perf_counter() - begun)


def programs() -> Iterator[tuple[str, str, Callable[[bool], Loop], tuple[str, ...]]]:
    """Yield set, name, maker and accepted changes of every fault that can be expressed."""
    folder = os.environ.get("GRADWATCH_FAULTS2")
    if folder:
        sys.path.insert(0, str(Path(folder)))
        for name, accepted in SECOND.items():
            yield "second set", name, lambda faulty, n=name: Second(n, 0, faulty=faulty), accepted
    for program in PROGRAMS.values():
        accepted = tuple(change for fault in program.faults for change in NAMES.get(fault, ()))
        if program.is_control or not accepted or program.make(0, faulty=True).fit is not None:
            continue
        yield "published", program.name, lambda faulty, n=program.name: Published(n, 0, faulty=faulty), accepted


def rows() -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the table: what, found, asked for."""
    torch.set_num_threads(1)
    totals: dict[str, list[Answer]] = {}
    only = os.environ.get("GRADWATCH_ONLY", "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, name, make, accepted in programs():
            if only and not name.startswith(tuple(only.split(","))):
                continue
            got = answer(name, lambda m=make: m(True), accepted)
            totals.setdefault(kind, []).append(got)
            won = None if got.found is None else got.found.winner
            said = got.error[:60] if got.error else "none" if won is None else won.name
            yield f"what if: {name}", f"{'right' if got.is_right else 'wrong'}: {said}", ""
    every = [each for some in totals.values() for each in some]
    for kind, some in totals.items():
        right = sum(each.is_right for each in some)
        yield (
            f"what if: {kind}, fault named first",
            f"{right} of {len(some)} ({right / len(some):.0%})",
            "at least 70 %",
        )
    yield "what if: restored bit for bit", f"{sum(a.is_restored for a in every)} of {len(every)}", "all"
    yield "what if: seconds, median", f"{float(np.median([a.seconds for a in every])):.1f}", ""
