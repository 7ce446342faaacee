"""What fails on one of two ranks alone: a treatment, a rule, a sink; under DDP and FSDP2, with `on_error="warn"`."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from gradwatch import Watch
from gradwatch.errors import GradwatchWarning, TrainingStopped
from gradwatch.rules import NonFinite
from gradwatch.sinks import MemorySink
from gradwatch.stats import UpdateMeter, _updates
from gradwatch.treatments import BaseTreatment, ClipByGlobalNorm, Noise, SkipStep
from gradwatch.watch._measuring import Measuring
from tests.modes.ranks import equal_on_all_ranks, main
from tests.modes.reference import EVERYTHING, STEPS, Net, batches, loss_of, mine, sgd
from tests.modes.sharded_cases import whole

FAILS_AT = 2
MODES: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": DistributedDataParallel, "fsdp": fully_shard}


def breaking(kind: type[BaseTreatment]) -> type[BaseTreatment]:
    """Return a treatment of that kind that breaks at one step on some ranks."""

    class Breaking(kind):
        def apply_(self, grads: Any, context: Any) -> Any:
            _break(context.step)
            return super().apply_(grads, context)

    return Breaking


Clips, Skips = breaking(ClipByGlobalNorm), breaking(SkipStep)
Shakes = breaking(Noise)  # its norms are measured anew


class Judges(NonFinite):
    """A rule that breaks at one step on some ranks."""

    def judge(self, record: Any, state: Any) -> Any:
        _break(record.step)
        return super().judge(record, state)


class Breaks(MemorySink):
    every = 1

    def write(self, record: Any, window: Any = ()) -> None:
        _break(record.step)
        super().write(record, window)


_breaking: list[bool] = [False]


def _break(step: int) -> None:
    if _breaking[0] and step == FAILS_AT:
        raise RuntimeError("a fault on this rank")


def fit(mode: str, rank: int, world: int, *, breaks: bool, bad: dict[int, int] | None = None, **options: Any):
    """Train; return the watch, the parameters after each step, the warnings, and how it was stopped."""
    net = Net()
    model = MODES[mode](net)
    optimizer = sgd(model)
    _breaking[0] = breaks
    stopped, weights = "", []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Watch(model, optimizer, **{"rules": "observe", **EVERYTHING, **options}) as watch:
            for step, (pair,) in enumerate(batches(world)):
                loss = loss_of(model, mine(pair, rank)) * (math.nan if (bad or {}).get(step) == rank else 1.0)
                loss.backward()
                try:
                    watch.step(loss=loss)
                except TrainingStopped as error:
                    stopped = str(error)
                    break
                optimizer.zero_grad()
                weights.append([whole(p).clone() for p in net.parameters()])
    _breaking[0] = False
    said = [str(w.message) for w in caught if issubclass(w.category, GradwatchWarning)]
    return watch, weights, said, stopped


def stays_equal(weights: list[list[torch.Tensor]]) -> None:
    equal_on_all_ranks([[p.tolist() for p in step] for step in weights])


def treatment_on_one(
    mode: str, make: Callable[[], BaseTreatment], *, every: int = 1
) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        """The failing rank vetoes its step; with the next one that is measured all know, and all end there."""
        watch, weights, said, stopped = fit(mode, rank, world, breaks=rank == 1, treatments=make(), every=every)
        assert "a treatment, or a rule that carries one, failed on 1 of 2 ranks" in stopped, stopped
        assert len(weights) == (FAILS_AT // every + 1) * every
        stays_equal(weights[:FAILS_AT])
        equal_on_all_ranks([r.step for r in watch.history])
        assert len([s for s in said if "failed" in s]) == (rank == 1), said
        assert [i.rule for i in watch.incidents] == ["treatment_failed"] * (rank == 1)

    return case


def veto_on_one(mode: str) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        """One rank vetoes by its treatment, the other because its own broke, in a step whose update is due."""
        watch, weights, said, stopped = fit(mode, rank, world, breaks=rank == 1, treatments=Skips(), bad={FAILS_AT: 0})
        assert "failed on 1 of 2 ranks" in stopped, stopped
        stays_equal(weights)
        assert all(torch.equal(p, q) for p, q in zip(weights[FAILS_AT - 1], weights[FAILS_AT], strict=True))
        equal_on_all_ranks([r.step for r in watch.history])
        assert len([s for s in said if "treatment" in s]) == (rank == 1), said

    return case


def fails_in(owner: Any, method: str, step: int, rank: int, run: Callable[[], Any]) -> Any:
    """Run with a method or function that raises when it is called for the `step`-th time on rank 1."""
    calls = itertools.count()
    real = getattr(owner, method)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == step and rank == 1:
            raise MemoryError("a fault on this rank")
        return real(*args, **kwargs)

    with patch.object(owner, method, broken):
        return run()


def updates_on_one(mode: str, owner: Any, method: str) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        """Update ratios are off on that rank; under FSDP2 no rank has them then, and none waits for the other."""
        watch, weights, said, stopped = fails_in(
            owner, method, FAILS_AT, rank, lambda: fit(mode, rank, world, breaks=False)
        )
        assert not stopped
        assert len(weights) == STEPS
        stays_equal(weights)
        assert ["update ratios" in s for s in said] == [True] * (rank == 1), said
        measured = [r.step for r in watch.history if "update_norm" in r.columns]
        known = range(STEPS) if mode == "ddp" and rank == 0 else range(FAILS_AT)
        assert measured == list(known), measured

    return case


def measuring_on_one(mode: str, *, treats: bool) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        """All ranks learn of it in the same step: what only watches is off, what treats is vetoed."""
        treatments = ClipByGlobalNorm(0.5) if treats else ()
        watch, weights, said, stopped = fails_in(
            Measuring,
            "_take_gradients",
            FAILS_AT,
            rank,
            lambda: fit(mode, rank, world, breaks=False, treatments=treatments),
        )
        assert not stopped
        assert len(weights) == STEPS
        stays_equal(weights)
        stood = all(torch.equal(p, q) for p, q in zip(weights[FAILS_AT - 1], weights[FAILS_AT], strict=True))
        assert stood == treats
        equal_on_all_ranks([r.step for r in watch.history])
        measured = [s for s in range(STEPS) if s != FAILS_AT] if treats else list(range(FAILS_AT))
        assert [r.step for r in watch.history if not math.isnan(r.global_norm)] == measured
        assert len(said) == 1, said

    return case


def treatment_on_all(mode: str, make: Callable[[], BaseTreatment]) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        """Where it fails on every rank the step is vetoed on every rank, and the run goes on."""
        _watch, weights, said, stopped = fit(mode, rank, world, breaks=True, treatments=make())
        assert not stopped
        assert len(weights) == STEPS
        stays_equal(weights)
        assert all(torch.equal(p, q) for p, q in zip(weights[FAILS_AT - 1], weights[FAILS_AT], strict=True))
        assert len(said) == 1, said

    return case


def rule_on_one(mode: str, *, then: bool) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        """One that only tells is told by the others; one that decides ends the run, before ranks decide unlike."""
        rules = [Judges(then=[SkipStep()] if then else ())]
        watch, weights, said, stopped = fit(
            mode, rank, world, breaks=rank == 1, rules=rules, bad={FAILS_AT + 2: 0} if then else None
        )
        stays_equal(weights)
        equal_on_all_ranks(stopped)
        equal_on_all_ranks([r.step for r in watch.history])
        assert bool(stopped) == then, stopped
        assert len(said) == (rank == 1), said
        assert len(weights) == (FAILS_AT + 1 if then else STEPS)

    return case


def sink_on_rank_zero(mode: str) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        """It is tried again, what it missed is told; the training, the other sinks and the other ranks don't notice."""
        other = MemorySink()
        watch, weights, said, stopped = fit(
            mode, rank, world, breaks=rank == 0, sinks=[Breaks(), other], log_every=1, rules="default"
        )
        assert not stopped
        assert len([s for s in said if "Breaks failed while writing" in s]) == (rank == 0), said
        assert (said == []) == (rank != 0), said
        stays_equal(weights)
        _, unbroken, _, _ = fit(mode, rank, world, breaks=False, sinks=[MemorySink()], rules="default")
        assert all(torch.equal(p, q) for a, b in zip(weights, unbroken, strict=True) for p, q in zip(a, b, strict=True))
        equal_on_all_ranks([r.step for r in watch.history])
        assert len(other.records) == (STEPS if rank == 0 else 0)

    return case


def moves_on_one(mode: str, *, stops: bool) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        """What a hook moves on that rank at a vetoed step ends the run of all, where one is to end by it."""
        steps = itertools.count()

        def moves(optimizer: Any, args: Any, kwargs: Any) -> None:
            if next(steps) == FAILS_AT and rank == 1:
                optimizer.param_groups[0]["params"][0].data.add_(1.0)

        handle = register_optimizer_step_post_hook(moves)
        options = {"treatments": SkipStep(), "stop_on_unproven": stops, "memory_limit_mb": 1e-9}
        try:
            watch, weights, _, stopped = fit(mode, rank, world, breaks=False, bad={FAILS_AT: 0}, **options)
        finally:
            handle.remove()
        assert [i.rule for i in watch.incidents if i.rule.startswith("veto")] == ["veto_unproven"] * (rank == 1)
        assert len(weights) == (FAILS_AT + 1 if stops else STEPS)
        assert ("can't be proven on 1 of 2 ranks" in stopped) == stops, stopped
        equal_on_all_ranks(stopped)

    return case


def _clips() -> BaseTreatment:
    return Clips(0.5)


def _shakes() -> BaseTreatment:
    return Shakes(0.01)


CASES = {
    f"{mode}-{name}": make(mode)
    for name, make in {
        "treatment-fails-on-one-rank": lambda m: treatment_on_one(m, _clips),
        "treatment-fails-on-one-rank-between-measurements": lambda m: treatment_on_one(m, _clips, every=4),
        "noise-fails-on-one-rank": lambda m: treatment_on_one(m, _shakes),
        "vetoing-treatment-fails-on-one-rank": lambda m: veto_on_one(m),
        "copies-fail-on-one-rank": lambda m: updates_on_one(m, UpdateMeter, "_room_for"),
        "update-measurement-fails-on-one-rank": lambda m: updates_on_one(m, _updates, "_moved"),
        "measuring-fails-on-one-rank": lambda m: measuring_on_one(m, treats=False),
        "measuring-for-treatments-fails-on-one-rank": lambda m: measuring_on_one(m, treats=True),
        "treatment-fails-on-all-ranks": lambda m: treatment_on_all(m, _clips),
        "rule-fails-on-one-rank": lambda m: rule_on_one(m, then=False),
        "deciding-rule-fails-on-one-rank": lambda m: rule_on_one(m, then=True),
        "weights-move-at-a-vetoed-step-on-one-rank": lambda m: moves_on_one(m, stops=True),
        "weights-move-and-nobody-stops": lambda m: moves_on_one(m, stops=False),
        "sink-fails-on-rank-zero": lambda m: sink_on_rank_zero(m),
    }.items()
    for mode in MODES
}

if __name__ == "__main__":
    main(CASES)
