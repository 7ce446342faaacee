"""What ranks run with parameters in pieces: FSDP2, HSDP, tensor parallelism, and Lightning's ModelParallelStrategy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gradwatch import Watch
from gradwatch.treatments import ClipByGlobalNorm
from gradwatch.watch._produced import CADENCE
from tests.modes.lightning_cases import Module, loader, quiet, trainer
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
    near,
    same,
    sgd,
    train_in_float64,
)

PLAN = {"body.0": ColwiseParallel, "body.1": RowwiseParallel}


def shard(net: nn.Module, mesh: Any = None, *, ignore: bool = False) -> None:
    ignored = set(net.last.parameters()) if ignore else None
    for layer in net.body:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh, ignored_params=ignored)


def fsdp(net: nn.Module, world: int) -> int:
    shard(net, init_device_mesh("cpu", (world,), mesh_dim_names=("dp",)))
    return world


def hsdp(net: nn.Module, world: int) -> int:
    shard(net, init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard")))
    return world


def tensor_parallel(net: nn.Module, world: int) -> int:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    parallelize_module(net, mesh, {path: style() for path, style in PLAN.items()})
    return 1


def both(net: nn.Module, world: int) -> int:
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(net, mesh["tp"], {path: style() for path, style in PLAN.items()})
    shard(net, mesh["dp"])
    return world // 2


def fit(net, rank, world, distribute: Callable[[nn.Module, int], int], *, watched=True, bad=None, **options):
    """Distribute a model, train it, and return its watch (closed) and how many batches the ranks see at once."""
    at_once = distribute(net, world)
    # Ranks of one tensor-parallel group are neighbours in the mesh, and share a batch.
    number = rank * at_once // world
    optimizer = sgd(net)
    watch = None
    if watched:
        watch = Watch(net, optimizer, **{"rules": "observe", "on_error": "raise", **EVERYTHING, **options})
    for step, (pair,) in enumerate(batches(at_once)):
        loss = loss_of(net, mine(pair, number))
        if (bad or {}).get(step) == number:
            loss = loss * math.nan
        loss.backward()
        if watch is None:
            optimizer.step()
        else:
            watch.step(loss=loss, batch=mine(pair, number))
        optimizer.zero_grad()
    if watch is not None:
        watch.close()
        equal_on_all_ranks(same(watch.history))
        equal_on_all_ranks([str(i) for i in watch.incidents])
        seen = [r.num_samples for r in watch.history]
        assert seen == [at_once * ROWS] * STEPS, seen
    return watch, at_once


def whole(p: torch.Tensor) -> torch.Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def against_reference(rank, world, distribute, *, at_once, reference=None, **options) -> Watch:
    net = Net()
    twin, expected = train_in_float64(net, batches(at_once), **(reference or {}))
    watch, seen = fit(net, rank, world, distribute, **options)
    assert seen == at_once
    compare(watch.history, expected)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(whole(p).double(), q, rtol=1e-4, atol=1e-6)
    return watch


def modes(name: str) -> tuple[Callable[[nn.Module, int], int], Callable[[int], int], int]:
    """Return how to distribute, batches at once, and sharded mesh dimensions."""
    return {
        "fsdp": (fsdp, lambda world: world, 1),
        "hsdp": (hsdp, lambda world: world, 1),
        "tp": (tensor_parallel, lambda world: 1, 1),
        "fsdp-tp": (both, lambda world: world // 2, 2),
    }[name]


def right_numbers(mode: str) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        distribute, at_once, _ = modes(mode)
        against_reference(rank, world, distribute, at_once=at_once(world))

    return case


def clipped(mode: str) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        distribute, at_once, _ = modes(mode)
        reference = {"max_norm": 0.5}
        against_reference(
            rank, world, distribute, at_once=at_once(world), reference=reference, treatments=ClipByGlobalNorm(0.5)
        )

    return case


def nan_on_one_rank(mode: str) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        distribute, at_once, _ = modes(mode)
        bad = {3: at_once(world) - 1}
        watch = against_reference(
            rank, world, distribute, at_once=at_once(world), reference={"bad": (3,)}, bad=bad, rules="autoclip"
        )
        (incident,) = watch.incidents
        assert (incident.rule, incident.treatments) == ("non_finite", ("skip_step",))

    return case


def applied(mode: str) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        """What the optimizer got is measured of whole gradients, at the cadence that all ranks know of."""
        distribute, at_once, _ = modes(mode)
        for share in (1.0, 0.5):
            net, data = Net(), batches(at_once(world), CADENCE + 2)
            distribute(net, world)
            optimizer, number = sgd(net), rank * at_once(world) // world
            with Watch(net, optimizer, rules="observe", on_error="raise") as watch:
                for (pair,) in data:
                    loss = loss_of(net, mine(pair, number))
                    loss.backward()
                    watch.after_backward(loss)
                    for p in net.parameters():
                        p.grad.mul_(share)
                    optimizer.step()
                    watch.after_step()
                    optimizer.zero_grad()
            equal_on_all_ranks(same(watch.history))
            known = {r.step: r.global_norm_applied for r in watch.history if r.global_norm_applied is not None}
            assert list(known) == [0, CADENCE], known
            for step, norm in known.items():
                near(norm, share * watch.history[step].global_norm_after, 2e-5, f"step {step}")
            assert ("changed the gradients" in watch.summary()) == (share != 1)

    return case


def neutral(mode: str) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        distribute, _, _ = modes(mode)
        nets = Net(), Net()
        for net, watched in zip(nets, (True, False), strict=True):
            fit(net, rank, world, distribute, watched=watched)
        assert all(torch.equal(whole(p), whole(q)) for p, q in zip(*(n.parameters() for n in nets), strict=True))

    return case


def collectives(mode: str) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        distribute, at_once, num_dims = modes(mode)
        never = dict.fromkeys(EVERYTHING)
        net, data = Net(), batches(at_once(world))
        distribute(net, world)
        number = rank * at_once(world) // world
        optimizer = sgd(net)
        made_in: list[list[tuple[str, int, int]]] = []
        with Watch(net, optimizer, rules="default", on_error="raise", **never) as watch:
            for (pair,) in data:
                loss = loss_of(net, mine(pair, number))
                loss.backward()
                with counted() as made:
                    watch.step(loss=loss)
                made_in.append(made)
                optimizer.zero_grad()
        num_tensors = len(list(net.parameters()))
        for made in made_in[1:]:
            assert [op for op, _, _ in made] == ["SUM"] * num_dims, made
            assert all(8 * (size - 100) <= 16 * num_tensors for _, size, _ in made), made

    return case


def ignored(rank: int, world: int, folder: Path) -> None:
    """Parameters that FSDP leaves alone: the user averages their gradients."""
    net = Net()
    _twin, expected = train_in_float64(net, batches(world))
    shard(net, init_device_mesh("cpu", (world,)), ignore=True)
    optimizer = sgd(net)
    with Watch(net, optimizer, rules="observe", on_error="raise", **EVERYTHING) as watch:
        for (pair,) in batches(world):
            loss = loss_of(net, mine(pair, rank))
            loss.backward()
            for p in net.last.parameters():
                dist.all_reduce(p.grad)
                p.grad /= world
            watch.step(loss=loss)
            optimizer.zero_grad()
    compare(watch.history, expected)
    equal_on_all_ranks(same(watch.history))
    assert {type(p.data) for p in net.parameters()} == {torch.Tensor, DTensor}


def unused_on_one_rank(rank: int, world: int, folder: Path) -> None:
    """A parameter that FSDP leaves alone, and that one rank alone does not use: the others' norms are right, and the
    vectors of all ranks are as long as ever."""
    net = Net(idle=True)
    twin = copy.deepcopy(net).double()
    for layer in net.body:
        fully_shard(layer)
    fully_shard(net, ignored_params=set(net.idle.parameters()))
    optimizer = sgd(net)
    with Watch(net, optimizer, rules="observe", on_error="raise", **EVERYTHING) as watch:
        for step, (pair,) in enumerate(batches(world)):
            x, y = mine(pair, rank)
            loss = loss_of(net, (x, y))
            if step % 2 == 0 or rank == 0:
                loss = loss + net.idle(torch.ones(1, 16)).square().mean()
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
    loss_of(twin, tuple(t.double() for t in batches(world)[0][0])).backward()
    first = watch.history[0]
    for name, p in twin.named_parameters():
        if not name.startswith("idle"):
            assert math.isclose(first["grad_norm", name], float(p.grad.norm()), rel_tol=1e-5), name
    for record in watch.history:
        known = record.measured("grad_norm")[record.index.position("idle.weight")]
        assert known == (record.step % 2 == 0 or rank == 0)
    shared = [n for n, _ in twin.named_parameters() if not n.startswith("idle")]
    equal_on_all_ranks([[r["grad_norm", n] for n in shared] for r in watch.history])


class Parallel(Module):
    """Distributed in `configure_model`, as Lightning asks."""

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh["tensor_parallel"].size() > 1:
            parallelize_module(self.net, mesh["tensor_parallel"], {path: style() for path, style in PLAN.items()})
        if mesh["data_parallel"].size() > 1:
            shard(self.net, mesh["data_parallel"])


def lightning(dp: int, tp: int, *, treated: bool = False) -> Callable[[int, int, Path], None]:
    def case(rank: int, world: int, folder: Path) -> None:
        net, data = Net(), batches(dp)
        reference = {"bad": (3,)} if treated else {}
        twin, expected = train_in_float64(net, data, **reference)
        for want in expected:
            for table in (want.norms, want.histograms, want.ratios):
                for name in list(table):
                    table[f"net.{name}"] = table.pop(name)
        number = rank // tp
        watch = quiet(**EVERYTHING, **({"rules": "autoclip"} if treated else {}))
        module = Parallel(net, number, {3: dp - 1} if treated else {})
        strategy = ModelParallelStrategy(data_parallel_size=dp, tensor_parallel_size=tp, process_group_backend="gloo")
        run = trainer(folder, watch, strategy=strategy)
        run.fit(module, loader(data, number))
        compare(watch.history, expected)
        equal_on_all_ranks(same(watch.history))
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(whole(p).double(), q, rtol=1e-4, atol=1e-6)

    return case


TWO = {
    **{f"{m}-right-numbers": right_numbers(m) for m in ("fsdp", "tp")},
    **{f"{m}-clip": clipped(m) for m in ("fsdp", "tp")},
    **{f"{m}-applied": applied(m) for m in ("fsdp", "tp")},
    **{f"{m}-nan-on-one-rank": nan_on_one_rank(m) for m in ("fsdp", "tp")},
    **{f"{m}-neutral": neutral(m) for m in ("fsdp", "tp")},
    **{f"{m}-collectives": collectives(m) for m in ("fsdp", "tp")},
    "fsdp-ignored-parameters": ignored,
    "fsdp-ignored-parameter-unused-on-one-rank": unused_on_one_rank,
    "lightning-fsdp": lightning(2, 1),
    "lightning-fsdp-nan-on-one-rank": lightning(2, 1, treated=True),
    "lightning-tp": lightning(1, 2),
}
FOUR = {
    **{f"{m}-right-numbers": right_numbers(m) for m in ("hsdp", "fsdp-tp")},
    **{f"{m}-clip": clipped(m) for m in ("hsdp", "fsdp-tp")},
    "fsdp-tp-applied": applied("fsdp-tp"),
    **{f"{m}-nan-on-one-rank": nan_on_one_rank(m) for m in ("hsdp", "fsdp-tp")},
    **{f"{m}-neutral": neutral(m) for m in ("hsdp", "fsdp-tp")},
    **{f"{m}-collectives": collectives(m) for m in ("hsdp", "fsdp-tp")},
    "lightning-fsdp-tp": lightning(2, 2),
}
CASES = {**TWO, **FOUR}

if __name__ == "__main__":
    main(CASES)
