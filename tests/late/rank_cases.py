"""What two ranks run on devices whose numbers come to each in its own time: to the first at once, to the other late."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gradwatch.errors import TrainingStopped
from gradwatch.rules import Exploding, Expression, NonFinite
from gradwatch.treatments import ClipByGlobalNorm, ClipToLimit, LowerLearningRate, Rollback, SkipStep, Stop
from tests.late.device import late, there
from tests.late.loops import Loop, fused, momentum, quiet
from tests.late.places import Place
from tests.modes.ranks import equal_on_all_ranks, main

LAGS = 0, 5


class Group(dist.ProcessGroup):
    """Collectives of the late device, by those of the CPU."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> Any:
        hosts = [t.cpu() for t in tensors]
        work = self._gloo.allreduce(hosts, options)
        work.wait()
        for tensor, host in zip(tensors, hosts, strict=True):
            tensor.copy_(host)
        return work

    def allgather(self, *arguments: Any) -> Any:
        return self._gloo.allgather(*arguments)

    def broadcast(self, *arguments: Any) -> Any:
        return self._gloo.broadcast(*arguments)

    def barrier(self, *arguments: Any) -> Any:
        return self._gloo.barrier(*arguments)

    def getBackendName(self) -> str:
        return "by_gloo"


def train(
    rank: int, steps: int, at: dict[int, float], *, asks: bool = False, **options: Any
) -> tuple[Loop, list[float]]:
    """Train on equal gradients; every rank ends with equal weights, records and incidents. Return what rates were
    multiplied by, too, at each step.

    Args:
        rank: whose numbers come by its own lag.
        steps: how many.
        at: what the loss is multiplied by.
        asks: the first rank alone is asked for everything at every step.
        options: of the loop.
    """
    device = there()
    device.set_lag(LAGS[rank])
    loop = Loop(Place(LAGS[rank], torch.device("late:0"), is_real=True), **options)
    weights, factors = [], []
    with quiet(), loop.ending(), loop.watch:
        for step in range(steps):
            loop.once(at.get(step, 1.0))
            if asks and rank == 0:
                assert loop.watch.incidents is not None
                assert loop.watch.state_dict()
            factors.append(loop.watch.session.engine.rates.factor)
            weights.append([p.detach().cpu().tolist() for p in loop.model.parameters()])
    assert not loop.watch.session.engine.guard.failed, loop.watch.session.engine.guard.failed
    equal_on_all_ranks(factors)
    for step in weights:
        equal_on_all_ranks(step)
    equal_on_all_ranks(loop.end)
    equal_on_all_ranks([f"{r.step} {r.global_norm} {r.global_norm_after} {r.skipped}" for r in loop.watch.history])
    equal_on_all_ranks([str(i) for i in loop.watch.incidents])
    return loop, factors


def spikes(asks: bool) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        """What is clipped to follows the past, which one rank knows earlier than the other."""
        at = dict.fromkeys(range(70, 90, 3), 30.0)
        clips = Exploding(z=8, ratio=4, then=ClipToLimit())
        loop, _ = train(rank, 100, at, asks=asks, optimizer=momentum, rules=[clips])
        assert sum(any(t.applied for t in r.treatments) for r in loop.watch.history) >= 5

    return case


def lower_rates(rank: int, world: int, folder: Path) -> None:
    rule = Expression("step == 30", name="trouble", keep_firing_for=0, then=LowerLearningRate(0.1, steps=10))
    _, factors = train(rank, 80, {}, asks=True, optimizer=momentum, rules=[rule])
    lowered = [step for step, factor in enumerate(factors) if factor == 0.1]
    assert len(lowered) == 10
    assert lowered[0] <= 30 + 33


def stops(rank: int, world: int, folder: Path) -> None:
    rule = Expression("step == 30", name="trouble", then=Stop())
    loop, _ = train(rank, 80, {}, asks=True, optimizer=momentum, rules=[rule])
    assert loop.end.startswith(TrainingStopped.__name__)


def skips(rank: int, world: int, folder: Path) -> None:
    at = dict.fromkeys((20, 21, 40), math.nan)
    loop, _ = train(rank, 60, at, asks=True, optimizer=fused, rules=[NonFinite(then=SkipStep())])
    assert [r.step for r in loop.watch.history if r.skipped] == [20, 21, 40]


def too_many_skips_end_all(rank: int, world: int, folder: Path) -> None:
    at = dict.fromkeys(range(20, 60), math.nan)
    loop, _ = train(rank, 60, at, asks=True, optimizer=fused, rules=[NonFinite(then=SkipStep(max_consecutive=5))])
    assert "5 optimizer steps in a row were skipped" in loop.end


def goes_back(rank: int, world: int, folder: Path) -> None:
    rule = Expression("step == 60", name="trouble", keep_firing_for=0, then=Rollback(steps=10))
    loop, _ = train(rank, 110, {}, asks=True, optimizer=momentum, rules=[rule])
    (incident,) = loop.watch.incidents
    assert incident.details["rolled_back_to"] <= 50
    assert incident.details["rolled_back_from"] <= 60 + 33


def changes(*, alone: bool) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        """A layer more at a step, on all ranks or on one: vectors stay of one length until all have heard of it."""
        there().set_lag(LAGS[rank])
        loop = Loop(
            Place(LAGS[rank], torch.device("late:0"), is_real=True),
            optimizer=momentum,
            activations_every=1,
            replicas_every=1,
            treatments=ClipByGlobalNorm(1e-3),
        )
        with warnings.catch_warnings(record=True) as told, loop.ending(), loop.watch:
            warnings.simplefilter("always")
            for step in range(80):
                if step == 20 and not (alone and rank == 0):
                    more = torch.nn.Linear(3, 3, bias=False)
                    torch.nn.init.eye_(more.weight)
                    loop.model.append(more.to("late:0"))
                    loop.optimizer.add_param_group({"params": list(more.parameters())})
                loop.once()
        history = loop.watch.history
        equal_on_all_ranks([loop.end, [(r.step, r.skipped, r.measured("grad_norm").any().item()) for r in history]])
        assert len([w for w in told if "do not hold the same" in str(w.message)]) == alone, told
        seen = [r.step for r in history if r.measured("grad_norm").any()]
        assert (len(seen) == 80) != alone, seen
        assert any(t.applied for t in history[-1].treatments) != alone
        if not alone:
            assert history[-1].measured("output_rms").sum() == 4
            assert history[-1].scalars["replicas_differ"] == 0

    return case


CASES = {
    "changes on all": changes(alone=False),
    "changes on one": changes(alone=True),
    "clips": spikes(asks=False),
    "clips, one rank asked": spikes(asks=True),
    **{case.__name__: case for case in (lower_rates, stops, skips, too_many_skips_end_all, goes_back)},
}

if __name__ == "__main__":
    late()
    dist.Backend.register_backend("by_gloo", Group, devices=["cpu", "late"])
    main(CASES, "by_gloo")
