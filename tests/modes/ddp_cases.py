"""What two ranks of DistributedDataParallel run under a plain `Watch`."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradwatch import Watch
from gradwatch.treatments import ClipByGlobalNorm, ZClip
from tests.modes.ranks import counted, equal_on_all_ranks, main
from tests.modes.reference import (
    EVERYTHING,
    ROWS,
    STEPS,
    Net,
    batches,
    compare,
    loss_of,
    mine,
    same,
    sgd,
    train_in_float64,
)

STRICT = {**EVERYTHING, "on_error": "raise"}


def fit(net, rank, world, *, ddp=None, micro=1, bad=None, spikes=None, steps=STEPS, watch_options=None, watched=True):
    """Train under DDP and return the watch (closed) and the losses of this rank."""
    model = DistributedDataParallel(net, **(ddp or {}))
    optimizer = sgd(model)
    watch = Watch(model, optimizer, **{"rules": "observe", **STRICT, **(watch_options or {})}) if watched else None
    for step, parts in enumerate(batches(world, steps, micro)):
        values = []
        for i, pair in enumerate(parts):
            with model.no_sync() if i + 1 < len(parts) else torch.enable_grad():
                value = loss_of(model, mine(pair, rank)) * (spikes or {}).get(step, 1.0)
                if (bad or {}).get(step) == rank:
                    value = value * math.nan
                values.append(value.detach())
                (value / len(parts)).backward()
        if watch is None:
            optimizer.step()
        else:
            watch.step(loss=torch.stack(values).mean())
        optimizer.zero_grad()
    if watch is not None:
        watch.close()
        equal_on_all_ranks(same(watch.history))
        equal_on_all_ranks([str(i) for i in watch.incidents])
    return watch


def against_reference(net, rank, world, *, reference=None, **options) -> Watch:
    micro, steps = options.get("micro", 1), options.get("steps", STEPS)
    twin, expected = train_in_float64(net, batches(world, steps, micro), **(reference or {}))
    watch = fit(net, rank, world, **options)
    compare(watch.history, expected)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-6)
    assert [r.num_samples for r in watch.history] in ([0] * steps, [world * ROWS] * steps)
    return watch


def plain(rank: int, world: int, folder: Path) -> None:
    against_reference(Net(), rank, world)


def find_unused(rank: int, world: int, folder: Path) -> None:
    watch = against_reference(Net(idle=True), rank, world, ddp={"find_unused_parameters": True})
    record = watch.history[0]
    assert not record.measured("grad_norm")[record.index.position("idle.weight")]


def static_graph(rank: int, world: int, folder: Path) -> None:
    against_reference(Net(), rank, world, ddp={"static_graph": True})


def bucket_views(rank: int, world: int, folder: Path) -> None:
    options = {"ddp": {"gradient_as_bucket_view": True}, "watch_options": {"treatments": ClipByGlobalNorm(0.5)}}
    against_reference(Net(), rank, world, reference={"max_norm": 0.5}, **options)


def no_sync(rank: int, world: int, folder: Path) -> None:
    against_reference(Net(), rank, world, micro=3)


def tied(rank: int, world: int, folder: Path) -> None:
    watch = against_reference(Net(tied=True), rank, world)
    assert "body.1.weight" not in watch.history[0].index.paths


def clipped(rank: int, world: int, folder: Path) -> None:
    watch = against_reference(
        Net(), rank, world, reference={"max_norm": 0.5}, watch_options={"treatments": ClipByGlobalNorm(0.5)}
    )
    assert any(t.applied for r in watch.history for t in r.treatments)


def nan_on_one_rank(rank: int, world: int, folder: Path) -> None:
    watch = against_reference(
        Net(), rank, world, reference={"bad": (3,)}, bad={3: 1}, watch_options={"rules": "autoclip"}
    )
    (incident,) = watch.incidents
    assert (incident.rule, incident.treatments) == ("non_finite", ("skip_step",))


def ten_bad_batches_of_a_hundred(rank: int, world: int, folder: Path) -> None:
    """Each on one rank only, now on this one, now on that: all ranks leave these steps out, and train on the others."""
    at = (0, 7, 8, 23, 41, 42, 43, 66, 89, 99)
    bad = {step: i % world for i, step in enumerate(at)}
    nets = Net(), Net()
    watch = fit(nets[0], rank, world, steps=100, bad=bad, watch_options={"rules": "autoclip"})
    assert tuple(r.step for r in watch.history if r.skipped) == at
    assert watch.num_steps == 100
    assert not any(t.applied for r in watch.history if not r.skipped for t in r.treatments)
    equal_on_all_ranks([p.tolist() for p in nets[0].parameters()])
    # The same by hand, with these batches left out: to the bit.
    model = DistributedDataParallel(nets[1])
    optimizer = sgd(model)
    for step, (pair,) in enumerate(batches(world, 100)):
        if step not in at:
            loss_of(model, mine(pair, rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(*(net.parameters() for net in nets), strict=True))


def zclip(rank: int, world: int, folder: Path) -> None:
    def treatment() -> ZClip:
        return ZClip(warmup=4)

    net, steps, spikes = Net(), 12, {9: 1000.0}
    alone = Net().double()
    optimizer = sgd(alone)
    with Watch(alone, optimizer, rules="observe", treatments=treatment()) as reference:
        for step, ((x, y),) in enumerate(batches(world, steps)):
            loss = loss_of(alone, (x.double(), y.double())) * spikes.get(step, 1.0)
            loss.backward()
            reference.step(loss=loss)
            optimizer.zero_grad()
    watch = fit(net, rank, world, steps=steps, spikes=spikes, watch_options={"treatments": treatment()})
    after = torch.tensor([[r.global_norm, r.global_norm_after] for r in watch.history])
    wanted = torch.tensor([[r.global_norm, r.global_norm_after] for r in reference.history])
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-6)
    assert after[9, 1] < after[9, 0] / 100


def neutral(rank: int, world: int, folder: Path) -> None:
    nets = [Net(), Net()]
    for net, watched in zip(nets, (True, False), strict=True):
        fit(net, rank, world, micro=2, watched=watched)
    assert all(torch.equal(p, q) for p, q in zip(*(net.parameters() for net in nets), strict=True))


def one_small_sum(rank: int, world: int, folder: Path) -> None:
    with counted() as made:
        fit(Net(), rank, world, watch_options=dict.fromkeys(EVERYTHING) | {"rules": "default"})
    # One more at the first step: whether all ranks hold the same.
    assert [(op, ranks) for op, _, ranks in made] == [("SUM", world)] * (1 + STEPS)
    assert max(size for _, size, _ in made) <= 100
    with counted() as made:
        fit(Net(), rank, world)
    assert [op for op, _, _ in made] == ["SUM", *["SUM", "MAX"] * STEPS]


def rank_zero_writes(rank: int, world: int, folder: Path) -> None:
    fit(Net(), rank, world, bad={2: 0}, watch_options={"rules": "default", "run_dir": folder / f"of-rank-{rank}"})
    dist.barrier()
    assert sorted(p.name for p in folder.iterdir()) == ["of-rank-0"]


def one_rank_fails_to_measure(rank: int, world: int, folder: Path, *, treated: bool = False) -> None:
    class Breaks:
        """A batch that can't be looked at on one rank: nobody may wait for that rank."""

    net = Net()
    model = DistributedDataParallel(net)
    optimizer = sgd(model)
    treatments = [ClipByGlobalNorm(0.5)] if treated else []
    watch = Watch(model, optimizer, rules="observe", treatments=treatments, **EVERYTHING)
    kept = watch.session.engine.meter.listed_gradients
    skipped = []
    for step, (pair,) in enumerate(batches(world)):
        loss_of(model, mine(pair, rank)).backward()
        if step == 2 and rank == 1:
            watch.session.engine.meter.listed_gradients = _raises
        before = net.last.weight.detach().clone()
        watch.step(loss=torch.tensor(1.0))
        skipped.append(torch.equal(before, net.last.weight.detach()))
        watch.session.engine.meter.listed_gradients = kept
        optimizer.zero_grad()
    watch.close()
    equal_on_all_ranks(skipped)
    equal_on_all_ranks(len(watch.history))
    equal_on_all_ranks([p.tolist() for p in net.parameters()])
    assert skipped == [treated and step == 2 for step in range(STEPS)]


def _raises(*args: object) -> None:
    raise RuntimeError("a fault on one rank")


def one_rank_fails_under_treatments(rank: int, world: int, folder: Path) -> None:
    one_rank_fails_to_measure(rank, world, folder, treated=True)


def rank_local_scalars(rank: int, world: int, folder: Path) -> None:
    net = Net()
    model = DistributedDataParallel(net)
    optimizer = sgd(model)
    watch = Watch(model, optimizer, **STRICT)
    for (pair,) in batches(world):
        watch.validation(loss=1.0 + rank)
        loss_of(model, mine(pair, rank)).backward()
        watch.step(loss=1.0 + rank)
        optimizer.zero_grad()
    watch.close()
    equal_on_all_ranks(same(watch.history))
    assert [r.scalars["val_loss"] for r in watch.history] == [1.5] * STEPS
    assert [r.loss for r in watch.history] == [1.5] * STEPS


def local_norms(rank: int, world: int, folder: Path) -> None:
    net = Net()
    data = batches(world)
    expected = []
    for r in range(world):
        alone = Net().double()
        x, y = mine(data[0][0], r)
        (loss_of(alone, (x.double(), y.double())) * (100.0 if r == 1 else 1.0)).backward()
        expected.append(math.sqrt(sum(float(p.grad.square().sum()) for p in alone.parameters())))
    model = DistributedDataParallel(net)
    optimizer = sgd(model)
    watch = Watch(model, optimizer, local_norms=True, **STRICT)
    for (pair,) in data[:1]:
        (loss_of(model, mine(pair, rank)) * (100.0 if rank == 1 else 1.0)).backward()
        watch.step()
    watch.close()
    scalars = watch.history[0].scalars
    for r in range(world):
        assert math.isclose(scalars[f"local_norm/{r}"], expected[r], rel_tol=1e-5)
    equal_on_all_ranks(same(watch.history))
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


CASES = {
    "plain": plain,
    "find-unused-parameters": find_unused,
    "static-graph": static_graph,
    "gradient-as-bucket-view": bucket_views,
    "no-sync-accumulation": no_sync,
    "tied-weights": tied,
    "clip": clipped,
    "nan-on-one-rank": nan_on_one_rank,
    "ten-bad-batches-of-a-hundred": ten_bad_batches_of_a_hundred,
    "zclip": zclip,
    "neutral": neutral,
    "one-small-sum-a-step": one_small_sum,
    "rank-zero-writes": rank_zero_writes,
    "rank-local-scalars": rank_local_scalars,
    "one-rank-fails-to-measure": one_rank_fails_to_measure,
    "one-rank-fails-under-treatments": one_rank_fails_under_treatments,
    "local-norms": local_norms,
}

if __name__ == "__main__":
    main(CASES)
