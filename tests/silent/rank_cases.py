"""What several ranks run: one of them has a flipped bit, or the data of another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradwatch import Watch
from tests.modes.ranks import equal_on_all_ranks, main

from .training import batch, flip, weak_network

RULES = {"rules": ["rank_divergence", "recomputation_differs", "same_batches_on_ranks"]}
STEPS, WHEN = 9, 6


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 3))


def train(
    rank: int,
    fault: Callable[[int, nn.Module, str], object] = lambda *_: None,
    *,
    prepare: Callable[[Watch], object] = lambda _: None,
    model: nn.Module | None = None,
    wrap: Callable[[nn.Module], Any] = DistributedDataParallel,
    steps: int = STEPS,
    data: Callable[[int, int], int] = lambda step, rank: 100 * step + rank,
    **options: Any,
) -> Watch:
    """Train on batches of this rank's own; `fault` is called before each forward and between backward and the step."""
    model = network() if model is None else model
    wrapped = wrap(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    options = {"rules": RULES, "replicas_every": 1, "on_error": "raise", **options}
    with Watch(wrapped, optimizer, **options) as watch:
        prepare(watch)
        for step in range(steps):
            x, y = batch(data(step, rank))
            fault(step, model, "before forward")
            loss = F.cross_entropy(wrapped(x), y)
            loss.backward()
            fault(step, model, "after backward")
            watch.step(loss)
            optimizer.zero_grad()
    equal_on_all_ranks([str(i) for i in watch.incidents])
    return watch


def told(watch: Watch, rule: str) -> Any:
    return next((i for i in watch.incidents if i.rule == rule), None)


def a_weight(rank: int, world: int, folder: Path) -> None:
    """Also with two ranks the one whose weight was flipped is named: its weights changed between two steps."""
    for who, bit in ((0, 30), (1, 0), (world - 1, 31)):

        def fault(step: int, model: nn.Module, when: str, who: int = who, bit: int = bit) -> None:
            if step == WHEN and rank == who and when == "before forward":
                flip(model[3].weight, 7, bit)

        found = told(train(rank, fault), "rank_divergence")
        assert found is not None, (who, bit)
        assert (found.first_step, found.severity, found.first_path) == (WHEN, "critical", "3.weight"), found
        assert f"weights of rank {who} are not those" in found.message, found.message


def a_gradient(rank: int, world: int, folder: Path) -> None:
    """After the reduction; of three and more ranks the one is named by the others, of two by what both brought: but for
    the last bits, which are below what rounding leaves of that."""
    for who, bit in ((1, 0), (0, 15), (0, 31), (1, 29)):

        def fault(step: int, model: nn.Module, when: str, who: int = who, bit: int = bit) -> None:
            if step == WHEN and rank == who and when == "after backward":
                flip(model[0].weight.grad, 3, bit)

        watch = train(rank, fault, steps=WHEN + 1)
        found = told(watch, "rank_divergence")
        assert (found.first_step, found.first_path) == (WHEN, "0.weight"), found
        is_named = world > 2 or bit > 10
        named = f"gradients of rank {who} are not those" if is_named else "ranks' gradients are not the same"
        assert named in found.message, (bit, found.message)
        assert watch.history[WHEN].scalars["replica_rank"] == (who if is_named else -1)
    watch = train(rank, fault, steps=WHEN + 2)
    after = watch.history[-1]
    assert after.scalars["replicas_differ"] == 1, after.scalars  # what became of it
    assert "weights of rank 1 are not those" in told(watch, "rank_divergence").message


def what_is_not_the_mean(rank: int, world: int, folder: Path) -> None:
    """Gradients that are scaled after the reduction are as far from what was brought on all ranks: nobody is named."""

    def fault(step: int, model: nn.Module, when: str) -> None:
        if when == "after backward":
            for p in model.parameters():
                p.grad.mul_(0.3)
            if step == WHEN and rank == 1:
                flip(model[0].weight.grad, 3, 10)

    watch = train(rank, fault, steps=WHEN + 1)
    assert watch.history[WHEN].scalars["replica_rank"] == (1 if world > 2 else -1)
    assert told(watch, "rank_divergence").first_step == WHEN


def at_a_cadence(rank: int, world: int, folder: Path) -> None:
    def fault(step: int, model: nn.Module, when: str) -> None:
        if step == WHEN and rank == 0 and when == "before forward":
            flip(model[3].weight, 7, 20)  # the last bit may be rounded away again before it is looked for

    watch = train(rank, fault, replicas_every=8)
    assert [r.step for r in watch.history if "replicas_differ" in r.scalars] == [0, 1, 2, 4, 8]
    found = told(watch, "rank_divergence")
    assert found.first_step == 8, found
    assert ("rank 0" in found.message) == (world > 2), found.message


def healthy(rank: int, world: int, folder: Path) -> None:
    watch = train(rank, recompute_every=2)
    assert not watch.incidents, watch.incidents
    last = watch.history[-1]
    assert (last.scalars["replicas_differ"], last.scalars["replica_gradients_differ"]) == (0, 0), last.scalars
    assert last.scalars["recompute_differs"] == 0, last.scalars
    assert (last.columns["replica_differs"][last.measured("replica_differs")] == 0).all()
    assert "replica_rank" not in last.scalars
    assert watch.history[2].scalars["ranks_alike"] == 0, watch.history[2].scalars


def a_computation(rank: int, world: int, folder: Path) -> None:
    """Averaged over ranks it is the same on all of them: what tells is that it does not come again."""

    def fault(step: int, model: nn.Module, when: str) -> None:
        if step == 8 and rank == 1 and when == "before forward":
            model[0].bits.append(0)

    watch = train(rank, fault, model=weak_network(), recompute_every=2)
    assert told(watch, "rank_divergence") is None
    found = told(watch, "recomputation_differs")
    assert (found.first_step, found.paths) == (8, ("0.weight",)), found
    assert "rank 1" in found.message, found.message


def in_pieces(rank: int, world: int, folder: Path) -> None:
    watch = train(rank, wrap=fully_shard, recompute_every=2, on_error="warn")
    assert not watch.incidents, watch.incidents
    assert not any("recompute_differs" in r.scalars for r in watch.history)
    last = watch.history[-1]
    assert "replica_differs" not in last.columns, last.columns.keys()
    assert not last.scalars.get("replicas_differ"), last.scalars
    assert any("twice is not seen" in note for note in watch.session.notes), watch.session.notes


def the_same_batches(rank: int, world: int, folder: Path) -> None:
    found = told(train(rank, data=lambda step, rank: step), "same_batches_on_ranks")
    assert found is not None
    assert (found.severity, found.value) == ("warning", world), found
    watch = train(rank, data=lambda step, rank: 7)
    assert told(watch, "same_batches_on_ranks") is None, watch.incidents


def one_that_can_not(rank: int, world: int, folder: Path) -> None:
    """A rank whose comparison has failed has nothing to say, and nobody is taken for faulty."""

    def prepare(watch: Watch) -> None:
        if rank == 0:
            watch.session.engine.guard.failed["comparing the ranks' copies"] = "broken"

    watch = train(rank, prepare=prepare)
    assert not watch.incidents, watch.incidents
    assert not any("replicas_differ" in r.scalars for r in watch.history)


CASES = {
    "a_weight": a_weight,
    "a_gradient": a_gradient,
    "what_is_not_the_mean": what_is_not_the_mean,
    "at_a_cadence": at_a_cadence,
    "healthy": healthy,
    "a_computation": a_computation,
    "in_pieces": in_pieces,
    "the_same_batches": the_same_batches,
    "one_that_can_not": one_that_can_not,
}

if __name__ == "__main__":
    main(CASES)
