"""What the ranks of the sharded tests run: each case is a function of (rank, world size) that asserts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gradwatch.stats import (
    Gradients,
    UpdateMeter,
    exponent_histograms,
    gradient_details,
    gramian,
    measure_gradients,
    reduce_max_,
    reduce_sum_,
    row_spread,
    second_look,
    tensor_norms,
)
from tests.gloo import leave


@contextmanager
def collectives() -> Iterator[list[str]]:
    """Note every all-reduce made inside."""
    made: list[str] = []
    original = dist.all_reduce

    def counted(tensor: Tensor, op=dist.ReduceOp.SUM, group=None, **kwargs):
        made.append(str(op).rpartition(".")[2])
        return original(tensor, op=op, group=group, **kwargs)

    dist.all_reduce = counted
    try:
        yield made
    finally:
        dist.all_reduce = original


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Linear(32, 5), nn.ReLU(), nn.Linear(5, 1))


def batch() -> Tensor:
    return torch.randn(8, 7, generator=torch.Generator().manual_seed(1))


def whole_grads() -> list[Tensor]:
    """Gradients of the same model and batch in one process."""
    reference = model()
    reference(batch()).sum().backward()
    return [p.grad for p in reference.parameters()]


def check(grads: list[Tensor], expected: list[Tensor], num_groups: int) -> None:
    """Compare every statistic of the pieces with that of the whole, and count the collectives."""
    with collectives() as made:
        norms = tensor_norms(grads)
    assert made == ["SUM"] * num_groups, made
    reference = torch.stack([g.double().norm() for g in expected])
    torch.testing.assert_close(norms, reference, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(second_look(grads), reference, rtol=1e-5, atol=1e-9)
    with collectives() as made:
        details = gradient_details(grads)
    assert sorted(made) == ["MAX"] * num_groups + ["SUM"] * num_groups, made
    wanted = gradient_details(expected)
    assert torch.equal(details.sums, wanted.sums)
    torch.testing.assert_close(details.maxima, wanted.maxima, rtol=1e-5, atol=1e-9)
    with collectives() as made:
        counts = exponent_histograms(grads)
    assert made == ["SUM"] * num_groups, made
    assert torch.equal(counts.sum(dim=1), torch.tensor([g.numel() for g in expected]))
    with collectives() as made:
        everything = measure_gradients(grads, histograms=True)
    assert sorted(made) == ["MAX"] * num_groups + ["SUM"] * num_groups, made
    torch.testing.assert_close(everything.norms, norms)
    assert torch.equal(everything.sums, details.sums)
    assert torch.equal(everything.maxima, details.maxima)
    assert torch.equal(everything.histograms, counts)
    # A value on the edge of a bin may round to either side in another order of summation.
    assert (counts - exponent_histograms(expected)).abs().sum() <= 4


def fsdp(rank: int, world: int) -> None:
    net = model()
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(net)
    net(batch()).sum().backward()
    params = list(net.parameters())
    assert all(isinstance(p.grad, DTensor) for p in params)
    assert any(p.grad.to_local().numel() == 0 for p in params) or rank == 0  # the last bias has one element
    check([p.grad for p in params], whole_grads(), num_groups=1)
    grads = Gradients.collect(list(net.named_parameters()))
    before = grads.norms.clone()
    grads.mul_(0.5)
    torch.testing.assert_close(tensor_norms(grads.grads), before / 2)
    torch.testing.assert_close(grads.norms, before / 2)


def fsdp_with_ignored(rank: int, world: int) -> None:
    net = model()
    fully_shard(net, ignored_params=set(net[2].parameters()))
    net(batch()).sum().backward()
    grads = [p.grad for p in net.parameters()]
    assert {isinstance(g, DTensor) for g in grads} == {True, False}
    check(grads, whole_grads(), num_groups=1)


def tensor_parallel(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    net = parallelize_module(model(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    net(batch()).sum().backward()
    grads = [p.grad for p in net.parameters()]
    assert {isinstance(g, DTensor) for g in grads} == {True, False}
    check(grads, whole_grads(), num_groups=1)


def fsdp_and_tensor_parallel(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    net = parallelize_module(model(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(net, mesh=mesh["dp"])
    net(batch()).sum().backward()
    check([p.grad for p in net.parameters()], whole_grads(), num_groups=2)


def mixed_placements(rank: int, world: int) -> None:
    mesh = DeviceMesh("cpu", list(range(world)))
    whole = [torch.randn(5, 6, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    pieces = [
        distribute_tensor(whole[0], mesh, [Shard(0)]),
        whole[1],
        distribute_tensor(whole[2], mesh, [Replicate()]),
        distribute_tensor(whole[3], mesh, [Shard(1)]),
        DTensor.from_local(whole[4] / world, mesh, [Partial()]),
    ]
    with collectives() as made:
        norms = tensor_norms(pieces[:4])
    assert made == ["SUM"]
    torch.testing.assert_close(norms, tensor_norms(whole[:4]), rtol=1e-6, atol=0)
    torch.testing.assert_close(tensor_norms(pieces), tensor_norms(whole), rtol=1e-6, atol=0)
    with collectives() as made:
        tensor_norms([pieces[2], whole[0]])
    assert made == []
    torch.testing.assert_close(row_spread(pieces[:4]), row_spread(whole[:4]))
    other = [w.flip(0) for w in whole]
    expected = gramian([whole, other])
    shards = [distribute_tensor(other[0], mesh, [Shard(0)]), other[1], distribute_tensor(other[2], mesh, [Replicate()])]
    torch.testing.assert_close(gramian([pieces[:3], shards]), gramian([whole[:3], other[:3]]))
    assert expected.shape == (2, 2)


def non_finite_and_extreme(rank: int, world: int) -> None:
    mesh = DeviceMesh("cpu", list(range(world)))
    tiny, bad, huge = torch.full((8,), 1e-30), torch.ones(8), torch.full((8,), 1e30)
    bad[0] = torch.nan
    norms = tensor_norms([distribute_tensor(t, mesh, [Shard(0)]) for t in (tiny, bad, huge)])
    assert norms[1].isnan()
    torch.testing.assert_close(norms[[0, 2]], torch.tensor([1e-30, 1e30]).double() * 8**0.5, rtol=1e-6, atol=0)


def updates(rank: int, world: int) -> None:
    net = model()
    fully_shard(net)
    params = list(net.parameters())
    meter = UpdateMeter(params, 1 << 20)
    meter.before()
    with torch.no_grad():
        for p in params:
            p.add_(1.0)
    with collectives() as made:
        stats = meter.after()
    assert made == ["SUM"]
    numels = torch.tensor([float(p.numel()) for p in params], dtype=torch.float64)
    torch.testing.assert_close(stats.update_norms, numels.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.param_norms, tensor_norms(list(model().parameters())), rtol=1e-6, atol=0)


def updates_of_samples(rank: int, world: int) -> None:
    """Pieces of unlike sizes (3 and 2 of 5 rows): ranks draw samples of their own, or none, and leave out the same."""
    mesh = DeviceMesh("cpu", list(range(world)))
    shapes = [(5, 400), (5, 8), (1, 80), (5, 3000)]
    params = [distribute_tensor(torch.full(shape, 2.0), mesh, [Shard(0)]) for shape in shapes]
    meter = UpdateMeter(params, 8192)
    assert meter.in_pieces
    for _ in range(2):
        for p in params:
            p.to_local().fill_(2.0)
        meter.before()
        assert meter.held_bytes <= 8192
        for p in params:
            p.to_local().add_(1.0)
        stats = meter.after()
        assert stats.positions == [0, 1, 2, 3]
        numels = torch.tensor([float(p.numel()) for p in params], dtype=torch.float64)
        torch.testing.assert_close(stats.update_norms, numels.sqrt())
        torch.testing.assert_close(stats.param_norms, 2 * numels.sqrt())
    small = UpdateMeter(params, 1000)
    assert small.left_out == [0, 3], small.left_out


def updates_of_a_rank_with_nothing_to_say(rank: int, world: int) -> None:
    mesh = DeviceMesh("cpu", list(range(world)))
    params = [distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]), torch.ones(3)]
    meter = UpdateMeter(params, 1 << 20)
    meter.before(blank=rank == 1)
    assert meter.after().update_norms.tolist() == [-1.0, -1.0]
    meter.before()
    assert meter.after().update_norms.tolist() == [0.0, 0.0]


def default_group(rank: int, world: int) -> None:
    assert reduce_sum_(torch.tensor([1.0, float(rank)])).tolist() == [world, world * (world - 1) / 2]
    assert reduce_max_(torch.tensor([float(rank)])).tolist() == [world - 1]


CASES: dict[str, tuple[Callable[[int, int], None], int]] = {
    "fsdp": (fsdp, 2),
    "fsdp-with-ignored-parameters": (fsdp_with_ignored, 2),
    "tensor-parallel": (tensor_parallel, 2),
    "fsdp-and-tensor-parallel": (fsdp_and_tensor_parallel, 4),
    "mixed-placements": (mixed_placements, 2),
    "non-finite-and-extreme": (non_finite_and_extreme, 2),
    "updates": (updates, 2),
    "updates-of-samples": (updates_of_samples, 2),
    "updates-of-a-rank-with-nothing-to-say": (updates_of_a_rank_with_nothing_to_say, 2),
    "default-group": (default_group, 2),
}


def main(rank: int, world: int, store: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for name in names:
        CASES[name][0](rank, world)
        if rank == 0:
            print("passed", name, flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    leave()
