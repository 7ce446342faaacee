"""Treatments of sharded gradients equal those of the whole ones, on every rank."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gradwatch.stats import Gradients
from gradwatch.treatments import (
    AdaptiveClip,
    Centralize,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    EmaClip,
    Noise,
    Normalize,
    Sanitize,
    SpikeClip,
    UnitLayout,
    ZClip,
)
from tests.gloo import spawn

from ._steps import Step

SHAPES = {"w": (6, 5), "wide": (5, 6), "bias": (7,), "transposed": (6, 4, 3), "plain": (3, 3)}


def build() -> list:
    adaptive, centralize = AdaptiveClip(0.05, head=None), Centralize()
    # As `bind` would find it in a model with a transposed convolution.
    adaptive._memory.layouts["transposed"] = UnitLayout(1)
    centralize._layouts["transposed"] = UnitLayout(1)
    return [
        *(ClipByGlobalNorm(1.0), ClipByNorm(0.5), ClipByValue(0.3), adaptive, centralize, Normalize(2.0, by="tensor")),
        *(EmaClip(warmup=1), SpikeClip(0.5), ZClip(warmup=2), Sanitize()),
    ]


def values(step: int) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Weight, gradient and second moment by name, the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    made = {}
    for name, shape in SHAPES.items():
        weight, grad, second = (torch.randn(shape, generator=generator) for _ in range(3))
        made[name] = (weight, grad * 10 ** (step % 3 - 1), second.square())
    if step == 3:
        made["w"][1][0, 0] = math.inf
    return made


class Optimizer:
    """What SpikeClip looks at."""

    def __init__(self) -> None:
        self.state: dict = {}
        self.defaults = {"betas": (0.9, 0.999)}


def treated(treatment, place) -> list[torch.Tensor]:
    """Return the gradients of some steps after treatment, placed by `place(name, tensor)`."""
    left = []
    for step in range(5):
        named, optimizer = [], Optimizer()
        for name, (weight, grad, second) in values(step).items():
            param = nn.Parameter(place(name, weight))
            param.grad = place(name, grad)
            optimizer.state[param] = {"exp_avg_sq": place(name, second)}
            named.append((name, param))
        grads = Gradients.collect(named)
        treatment.apply_(grads, Step(step=step, optimizers=(optimizer,)))
        left += [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads.grads]
    return left


def run_rank(rank: int, size: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    store = dist.FileStore(str(Path(folder) / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        mesh = init_device_mesh("cpu", (size,))
        # Uneven rows, units split inside, a replicated tensor, and one that is no DTensor.
        placements = {"w": Shard(0), "wide": Shard(1), "bias": Shard(0), "transposed": Shard(0)}

        def sharded(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name == "plain":
                return tensor.clone()
            return distribute_tensor(tensor.clone(), mesh, [placements.get(name, Replicate())])

        for one, other in zip(build(), build(), strict=True):
            for a, b in zip(treated(one, sharded), treated(other, lambda _, t: t.clone()), strict=True):
                torch.testing.assert_close(a, b, equal_nan=True, msg=lambda text, t=one: f"{t}: {text}")
        noisy(rank, size, mesh)
    finally:
        dist.destroy_process_group()


def noisy(rank: int, size: int, mesh) -> None:
    """Replicated gradients get the same noise on all ranks, pieces of one tensor each their own."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    named = []
    for name, placement in [("a", Replicate()), ("b", Shard(0))]:
        param = nn.Parameter(distribute_tensor(torch.zeros(2 * size, 3), mesh, [placement]))
        param.grad = distribute_tensor(torch.zeros(2 * size, 3), mesh, [placement])
        named.append((name, param))
    Noise(1.0).apply_(Gradients.collect(named), Step())
    mine = named[0][1].grad.to_local()
    theirs = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(theirs, mine)
    assert all(torch.equal(mine, other) for other in theirs)
    pieces = named[1][1].grad.full_tensor().chunk(size)
    assert not torch.equal(pieces[0], pieces[1])


@pytest.mark.slow
def test_sharded_gradients_are_treated_as_whole_ones(tmp_path) -> None:
    spawn(run_rank, (2, str(tmp_path)))
