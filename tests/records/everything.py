"""Trainings with everything on: what the engine can write, gathered by a rule that sees every record."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from gradwatch import Watch
from gradwatch.attention import AttentionScores
from gradwatch.records import StepRecord
from gradwatch.rules import Exploding, Expression, Rule
from gradwatch.treatments import MicroBatchSurgery, Rollback, Surgery
from gradwatch.watch._session import Session
from gradwatch.watch._settings import resolve
from gradwatch.watch._step_inputs import StepInputs

EVERY = {"activations_every": 1, "updates_every": 1, "histograms_every": 1, "local_norms": True}
SILENT = {"recompute_every": 1, "fingerprints": True}
AHEAD = ["step_curvature", "weight_spectra", "dormant_units", "effective_rank"]
SEEN: list[StepRecord] = []


class Witness(Rule):
    """Keeps every record that a rule is shown."""

    def judge(self, record, state):
        SEEN.append(record)
        return self.clear(record), state


def records() -> list[StepRecord]:
    """Return the records of all these trainings."""
    SEEN.clear()
    kept: list[StepRecord] = []
    ways = (classes, numbers, tokens, tasks, signs, agreement, scaled, alone, taken_back, shown, large, narrow)
    for watch in [way() for way in ways]:
        kept += watch.history
    kept += trained().history
    return [*kept, *SEEN]


def net(units: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, units))


def steps(watch: Watch, model: nn.Module, target: torch.Tensor, loss_of, count: int = 3) -> Watch:
    with watch:
        for _ in range(count):
            x = torch.randn(16, 4)
            out = model(x)
            loss = loss_of(out, target)
            watch.validation(loss=1.0, train_eval_loss=1.0, accuracy=0.5, batch=(x, target))
            loss.backward()
            watch.step(loss=loss, batch=(x, target), outputs=out)
            watch.optimizers[0].zero_grad()
    return watch


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 1e-3)


def classes() -> Watch:
    model = net(3)
    watch = Watch(
        model, sgd(model), rules=[Witness(), Exploding(warmup=2)], noise_scale=True, statistics=AHEAD, **EVERY
    )
    return steps(watch, model, torch.arange(16) % 3, nn.functional.cross_entropy, 40)


def taken_back() -> Watch:
    model = net(3)
    rule = Expression("step == 2", then=Rollback(steps=1))
    watch = Watch(model, sgd(model), rules=[Witness(), rule], **EVERY)
    return steps(watch, model, torch.arange(16) % 3, nn.functional.cross_entropy, 5)


def shown() -> Watch:
    """A loop that hands over inputs alone: what its loss compares is read from the loss."""
    model = net(3)
    with Watch(model, sgd(model), rules=[Witness()], **EVERY) as watch:
        for _ in range(3):
            x = torch.randn(16, 4)
            watch.backward(nn.functional.cross_entropy(model(x), torch.arange(16) % 3))
            watch.step(batch=x)
            watch.optimizers[0].zero_grad()
    return watch


def numbers() -> Watch:
    model = net(1)
    watch = Watch(model, sgd(model), rules=[Witness()], **EVERY, **SILENT)
    steps(watch, model, torch.randn(16, 1), lambda out, y: (out - y).square().mean())
    model = net(2)
    watch = Watch(model, sgd(model), rules=[Witness()], **EVERY)
    steps(watch, model, torch.rand(16, 2), lambda out, y: (out - y).square().mean())
    model = net(1)
    watch = Watch(model, sgd(model), rules=[Witness()], **EVERY)
    return steps(watch, model, torch.randn(16), lambda out, y: (out - y).square().mean())


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x[:, None]
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)[:, 0]


def tokens() -> Watch:
    """A language model with layers that differ between training and evaluation, under Adam with weight decay."""
    drop = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(16), nn.Dropout(0.1))
    model = nn.Sequential(nn.Embedding(11, 8), drop, Attention(), nn.Linear(8, 11))
    adam = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    heads = AttentionScores(every=1)
    with Watch(model, adam, rules=[Witness()], statistics=[heads], **EVERY) as watch:
        for _ in range(3):
            tokens = torch.randint(0, 11, (4, 17))
            x, y = tokens[:, :-1], tokens[:, 1:]
            out = model(x)
            loss = nn.functional.cross_entropy(out.flatten(0, 1), y.flatten())
            loss.backward()
            watch.step(loss=loss, batch=x, outputs=out, targets=y)
            adam.zero_grad()
    return watch


def tasks() -> Watch:
    model = net(2)
    with Watch(model, sgd(model), rules=[Witness()], surgery=Surgery("pcgrad"), **EVERY) as watch:
        for _ in range(2):
            out = model(torch.randn(8, 4))
            watch.backward({"a": out[:, 0].square().mean(), "b": -out[:, 1].mean()})
            watch.step()
            watch.optimizers[0].zero_grad()
    return watch


def micro_batches(**settings) -> Watch:
    model = net(1)
    with Watch(model, sgd(model), rules=[Witness()], surgery=MicroBatchSurgery(**settings), **EVERY) as watch:
        for _ in range(2):
            for last in (False, False, True):
                watch.backward(model(torch.randn(8, 4)).square().mean(), parts=3, last=last, batch_size=8)
            watch.step()
            watch.optimizers[0].zero_grad()
    return watch


def signs() -> Watch:
    return micro_batches(agreement="signs")


def agreement() -> Watch:
    micro_batches(method="pcgrad")
    return micro_batches(agreement="cosine")


def scaled() -> Watch:
    model = net(1)
    scaler = torch.amp.GradScaler("cpu")
    with Watch(model, sgd(model), rules=[Witness()], scaler=scaler, **EVERY) as watch:
        for _ in range(2):
            scaler.scale(model(torch.randn(8, 4)).square().mean()).backward()
            watch.step()
            watch.optimizers[0].zero_grad()
    return watch


def alone() -> Watch:
    first, second = net(1), net(1)
    both = nn.ModuleList([first, second])
    optimizers = [sgd(first), sgd(second)]
    with Watch(both, optimizers, rules=[Witness()], **EVERY) as watch:
        for _ in range(2):
            for model, optimizer in zip((first, second), optimizers, strict=True):
                loss = model(torch.randn(8, 4)).square().mean()
                loss.backward()
                watch.step(optimizer=optimizer, loss=loss)
    with (
        Watch(first, optimizers[0], rules=[Witness()]) as one,
        Watch(second, optimizers[1], rules=[Witness()]) as other,
    ):
        for _ in range(4):
            for part, model in ((one, first), (other, second)):
                model(torch.randn(8, 4)).square().mean().backward()
                part.step()
    return watch


def large() -> Watch:
    """A weight of which a copy is larger than what may be held."""
    model = nn.Linear(512, 512)
    with Watch(model, sgd(model), rules=[Witness()], memory_limit_mb=1, **EVERY) as watch:
        for _ in range(2):
            model(torch.randn(4, 512)).square().mean().backward()
            watch.step()
            watch.optimizers[0].zero_grad()
    return watch


def narrow() -> Watch:
    """Weights in 16 bits, whose updates may be rounded away."""
    model = nn.Linear(8, 8, dtype=torch.bfloat16)
    with Watch(model, sgd(model), rules=[Witness()], **EVERY) as watch:
        for _ in range(2):
            model(torch.randn(4, 8, dtype=torch.bfloat16)).square().mean().backward()
            watch.step()
            watch.optimizers[0].zero_grad()
    return watch


def trained() -> Session:
    """As an adapter does whose trainer clips."""
    model = net(1)
    session = Session(model, [sgd(model)], resolve(rules=[Witness()]))
    model(torch.randn(8, 4)).sum().backward()
    session.step(StepInputs(step=0, scalars={"trainer_clip": 1.0}))
    session.after_step()
    session.finish()
    session.close()
    return session


def names(found: list[StepRecord]) -> Iterator[str]:
    for record in found:
        yield from record.columns
        yield from record.scalars
