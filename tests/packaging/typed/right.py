"""A user's program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import gradwatch
from gradwatch import Watch, load_rules
from gradwatch.callbacks import AutoClip, GradWatch
from gradwatch.callbacks.fabric import GradWatch as FabricGradWatch
from gradwatch.callbacks.transformers import GradWatchCallback
from gradwatch.hooks import HookManager
from gradwatch.protocols import Context, RunMeta, Sink
from gradwatch.records import Finding, Incident, StepRecord
from gradwatch.requests import SaveCheckpoint
from gradwatch.rules import Exploding, Expression, NonFinite, Rule, RuleBook
from gradwatch.sinks import MemorySink, TensorBoardSink
from gradwatch.stats import Gradients, Statistic, View
from gradwatch.testing import check_rule, check_sink, check_statistic, check_treatment
from gradwatch.treatments import (
    BaseAction,
    BaseTreatment,
    Checkpoint,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipToLimit,
    SkipStep,
    ZClip,
    clip_by_global_norm_,
)


class LossPlateau(Rule):
    """Flags a loss that has not fallen."""

    patience: int = 500
    severity: str = "info"

    needs = frozenset({"loss"})

    def init(self) -> dict[str, float]:
        return {"best": float("inf"), "at": 0}

    def judge(self, record: StepRecord, state: dict[str, float]) -> tuple[Sequence[Finding], dict[str, float]]:
        if record.loss < state["best"]:
            state = {"best": record.loss, "at": record.step}
        waited = record.step - state["at"]
        return self.whole(record, waited > self.patience, waited, self.patience), state


class HalveBiases(BaseTreatment):
    """Multiply the gradients of biases by one half."""

    order = 5

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, float] | None:
        grads.select("*.bias").mul_(0.5)
        return {"applied": 1.0}


class Shout(BaseAction):
    """Ask for a checkpoint under a loud name."""

    name = "shout"

    def act(self, incident: Incident, context: Context) -> None:
        context.request(SaveCheckpoint(reason=str(incident), filename="HELP"))


class Printer(Sink):
    """Prints the global norm at every write."""

    every = 1

    def open(self, meta: RunMeta) -> None:
        print("watching", meta.model)

    def write(self, record: StepRecord, window: Sequence[StepRecord]) -> None:
        print(record.step, record.global_norm)


class GradientMean(Statistic):
    """Mean of each gradient."""

    needs = frozenset({"gradients"})
    num_sums = 2

    def sums(self, view: View) -> Tensor | None:
        return view.rows([g.sum() for g in view.grads], [torch.tensor(float(g.numel())) for g in view.grads])

    def finish(self, sums: NDArray[np.float64], maxima: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.divide(sums[:, 0], sums[:, 1])


def train() -> list[str]:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rules = RuleBook(
        [
            Exploding(z=16, ratio=10, then=ClipToLimit()),
            NonFinite(then=[SkipStep(max_consecutive=10), Checkpoint()]),
            LossPlateau(patience=3, then=Shout(), paths="*"),
            Expression("grad_norm > 1", name="large"),
        ]
    )
    options: dict[str, Any] = {"every": 1}
    with gradwatch.Watch(
        model,
        optimizer,
        rules=rules,
        treatments=[ClipByGlobalNorm(1.0), ClipByNorm(max_norm=2.0, paths="*"), ZClip(), HalveBiases()],
        statistics=[GradientMean()],
        sinks=[Printer(), MemorySink()],
        on_checkpoint=print,
        **options,
    ) as watch:
        loss = model(torch.ones(1, 4)).sum()
        loss.backward()
        outcome = watch.step(loss=loss)
        record = outcome.record
        if record is not None and not outcome.skip:
            norm: float = record.global_norm
            print(norm, [finding.path for finding in outcome.findings])
    with HookManager(model) as hooks:
        print(hooks.points("*"))
    _ = clip_by_global_norm_
    check_rule(LossPlateau())
    check_treatment(HalveBiases())
    check_sink(Printer)
    check_statistic(GradientMean())
    print(GradWatch(rules="autoclip"), AutoClip(), FabricGradWatch(), GradWatchCallback(), TensorBoardSink, Watch)
    print(load_rules("default"))
    return [incident.message for incident in watch.incidents]
