"""What ranks run that are taken back together: DDP, FSDP2 in pieces, Lightning's DDP."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradwatch import Watch
from gradwatch.rules import Expression
from gradwatch.treatments import Rollback
from tests.modes.ranks import equal_on_all_ranks, main


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Linear(10, 10))
        self.last = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.body(x)))


def state(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return what lies on this rank, copied."""
    held = [*net.parameters(), *net.buffers()]
    held += [t for s in optimizer.state.values() for t in s.values()]
    return [getattr(t, "_local_tensor", t).detach().clone() for t in held]


def train(
    net: nn.Module,
    model: nn.Module,
    rank: int,
    *,
    steps: int = 40,
    **settings: Any,
) -> tuple[Watch, dict[int, list[torch.Tensor]]]:
    """Train until the last step; return the watch (closed) and the state after every step."""
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    rule = Expression("step == 25", name="trouble", keep_firing_for=0, then=Rollback(**{"steps": 10, **settings}))
    generator = torch.Generator().manual_seed(rank)
    states = {}
    with Watch(model, optimizer, rules=[rule], activations_every=None) as watch:
        for step in range(steps):
            x = torch.randn(4, 6, generator=generator)
            loss = nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long())
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
            states[step + 1] = state(net, optimizer)
    return watch, states


def wrapped(rank: int, sharded: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = Net()
    if not sharded:
        return net, DistributedDataParallel(net)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net.body:
        if not isinstance(layer, nn.BatchNorm1d) and any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, net


def goes_back(rank: int, sharded: bool, **settings: Any) -> None:
    net, model = wrapped(rank, sharded)
    watch, states = train(net, model, rank, **settings)
    details = dict(watch.incidents[0].details)
    equal_on_all_ranks(details)
    assert (details["rolled_back_from"], details["rolled_back_to"]) == (25, 10), details
    assert all(map(torch.equal, states[26], states[10]))
    assert not all(map(torch.equal, states[27], states[11]))
    if not sharded:
        equal_on_all_ranks([t.tolist() for t in states[40][:8]])


def every_rank_goes_back_to_the_same(rank: int, world: int, folder: Path) -> None:
    goes_back(rank, sharded=False)


def every_rank_puts_back_its_own_pieces(rank: int, world: int, folder: Path) -> None:
    goes_back(rank, sharded=True)


def every_rank_has_files_of_its_own(rank: int, world: int, folder: Path) -> None:
    goes_back(rank, sharded=True, storage="disk", folder=folder / "files")
    dist.barrier()
    assert not list((folder / "files").rglob("*.pt"))


def a_snapshot_that_is_bad_on_one_rank_is_bad_for_all(rank: int, world: int, folder: Path) -> None:
    """Rank 1 alone holds a weight that is not finite: of FSDP it has a piece of its own."""

    net, model = wrapped(rank, sharded=True)
    optimizer = torch.optim.SGD(net.parameters(), 1e-2)
    rule = Expression("step == 35", name="trouble", keep_firing_for=0, then=Rollback(steps=10))
    with Watch(model, optimizer, rules=[rule], activations_every=None) as watch:
        training = watch.session.engine.rollbacks.training
        plain = training.weights
        bad = torch.full((2,), math.nan)
        for step in range(40):
            # The weights of this rank are not finite as step 20 is over.
            training.weights = (lambda: [*plain(), bad]) if step == 19 and rank == 1 else plain
            loss = model(torch.randn(4, 6)).square().mean()
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
    details = dict(watch.incidents[0].details)
    equal_on_all_ranks(details)
    assert details["rolled_back_to"] == 10, details


def none_goes_back_where_one_can_not(rank: int, world: int, folder: Path) -> None:
    net, model = wrapped(rank, sharded=False)
    optimizer = torch.optim.SGD(net.parameters(), 1e-2)
    rule = Expression("step == 25", name="trouble", keep_firing_for=0, then=Rollback(steps=10))
    with Watch(model, optimizer, rules=[rule], activations_every=None, on_error="warn") as watch:
        for step in range(30):
            if step == 22 and rank == 1:
                watch.session.engine.rollbacks.snapshots.held.pop()
            before = state(net, optimizer)
            loss = model(torch.randn(4, 6)).square().mean()
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
            if step == 25:
                assert all(map(torch.equal, state(net, optimizer)[:6], before[:6]))  # vetoed, and stayed
    said = watch.incidents[0].details["rollback"]
    equal_on_all_ranks(said)
    assert said == "not rolled back: the ranks hold different snapshots"


def rules_judged_after_the_step_take_all_back_at_one_step(rank: int, world: int, folder: Path) -> None:
    """`update_ratio` is known when the optimizer has moved; one rank is asked for its incidents, and judges earlier."""
    net, model = wrapped(rank, sharded=False)
    optimizer = torch.optim.SGD(net.parameters(), 1e-2)
    rule = Expression(
        "max_over(update_ratio) > 0 and step == 41", name="trouble", keep_firing_for=0, then=Rollback(steps=10)
    )
    states = {}
    with Watch(model, optimizer, rules=[rule], activations_every=None, updates_every=1) as watch:
        for step in range(70):
            loss = model(torch.randn(4, 6)).square().mean()
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
            states[step + 1] = state(net, optimizer)
            if rank == 0:
                assert watch.incidents is not None
    details = dict(watch.incidents[0].details)
    equal_on_all_ranks(details)
    start, to = details["rolled_back_from"], details["rolled_back_to"]
    assert all(map(torch.equal, states[start + 1], states[to])), (start, to)


CASES = {
    case.__name__: case
    for case in (
        every_rank_goes_back_to_the_same,
        every_rank_puts_back_its_own_pieces,
        every_rank_has_files_of_its_own,
        a_snapshot_that_is_bad_on_one_rank_is_bad_for_all,
        none_goes_back_where_one_can_not,
        rules_judged_after_the_step_take_all_back_at_one_step,
    )
}

if __name__ == "__main__":
    main(CASES)
