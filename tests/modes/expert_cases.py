"""What ranks run with experts: as DTensors over a mesh of their own, or as tensors that each rank has for itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gradwatch import Watch
from gradwatch.treatments import ClipByGlobalNorm
from tests.modes.ranks import equal_on_all_ranks, main
from tests.modes.reference import EVERYTHING, STEPS, compare, same, sgd, train_in_float64

WIDTH, EXPERTS = 8, 4


class Mixture(nn.Module):
    """A layer of experts in one tensor, as grouped matrix products have them, between two plain ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Linear(10, WIDTH)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        mixed = torch.einsum("bi,eio->beo", x, self.experts).tanh().mean(dim=1)
        found = self.last(x + mixed)
        return found.full_tensor() if isinstance(found, DTensor) else found


def batches() -> list[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(4)
    xs = [torch.randn(16, 10, generator=generator) for _ in range(STEPS)]
    return [[(x, torch.sin(x.sum(1, keepdim=True)))] for x in xs]


def loss_of(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    return (model(pair[0]) - pair[1]).square().mean()


def on_a_mesh(shape: tuple[int, ...]) -> Callable[[int, int, Path], None]:
    """Experts are cut over a mesh of several dimensions: by expert, by row, and repeated over the first."""

    def case(rank: int, world: int, folder: Path) -> None:
        twin, expected = train_in_float64(Mixture(), batches(), max_norm=0.1, loss=loss_of)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "experts", "rows"))
        model = Mixture()
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                cuts = [Replicate(), Shard(0), Shard(1)] if name == "experts" else [Replicate()] * 3
                module.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, cuts)))
        optimizer = sgd(model)
        # Not of modules: what they give are DTensors, which are not looked into.
        options = {**EVERYTHING, "activations_every": None, "on_error": "raise"}
        with Watch(model, optimizer, rules="default", treatments=ClipByGlobalNorm(0.1), **options) as watch:
            for (pair,) in batches():
                loss = loss_of(model, (distribute_tensor(pair[0], mesh, [Replicate()] * 3), pair[1]))
                loss.backward()
                watch.step(loss=loss)
                optimizer.zero_grad()
        compare(watch.history, expected, rel=1e-5)
        equal_on_all_ranks(same(watch.history))
        assert not watch.incidents, watch.incidents
        record = watch.history[0]
        flat = Mixture().experts.detach().flatten(1)
        spread = float((flat.amax(0) - flat.amin(0)).max() / flat.abs().max())
        assert abs(record["row_spread", "experts"] - spread) < 1e-6
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.full_tensor().double(), twin.get_parameter(name), rtol=1e-4, atol=1e-6)

    return case


class Own(nn.Module):
    """A shared layer, and experts of this rank."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.shared = nn.Linear(4, 4)
        self.experts = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x)
        return x + sum(expert(x) for expert in self.experts.values())


def unseen(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> Watch:
    """Train, and return the watch, after nothing was treated and it was said that something is not seen."""
    inner: Any = getattr(model, "module", model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Watch(model, optimizer, treatments=ClipByGlobalNorm(1e-9), rules="default", **EVERYTHING) as watch:
            for step in range(4):
                x = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * step + rank))
                loss = model(x).square().mean()
                loss.backward()
                for p in inner.shared.parameters():  # once more where DDP has done it
                    dist.all_reduce(p.grad)
                    p.grad.div_(dist.get_world_size())
                watch.step(loss=loss)
                optimizer.zero_grad()
        text = watch.summary()
    assert not watch.incidents, watch.incidents
    assert not any(t.applied for r in watch.history for t in r.treatments)
    assert any("seen" in str(w.message) for w in told), [str(w.message) for w in told]
    assert "treatments do not act" in text, text
    equal_on_all_ranks([watch.history[-1].unseen.get("shared.weight"), len(watch.history)])
    return watch


def marked(mark: str) -> Callable[[int, int, Path], None]:
    """Experts that each rank has for itself, under names that all ranks know, marked as such."""

    def case(rank: int, world: int, folder: Path) -> None:
        model = Own(["0"])
        for p in model.experts.parameters():
            if mark == "allreduce":
                p.allreduce = False  # type: ignore[attr-defined]
        names = [name for name, _ in model.named_parameters() if name.startswith("experts.")]
        if mark == "ignored":
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
            held: Any = DistributedDataParallel(model)
        else:
            held = model
        watch = unseen(held, sgd(held), rank)
        record = watch.history[-1]
        assert set(names) <= set(record.unseen), record.unseen
        assert not any(record.measured("grad_norm")[record.index.position(name)] for name in names)

    return case


def of_other_names(rank: int, world: int, folder: Path) -> None:
    """Ranks whose parameters have different names, and are not equally many: nothing fits, nothing hangs."""
    model = Own([str(rank)] if rank else ["a", "b"])
    watch = unseen(model, sgd(model), rank)
    assert all("shared.weight" in r.unseen for r in watch.history)
    assert not any(r.measured("grad_norm").any() for r in watch.history)
    dist.barrier()


def marked_on_one_rank(rank: int, world: int, folder: Path) -> None:
    """What one rank alone takes for its own: tables of unequal length in one sum would end the processes."""
    model = Own(["0"])
    for p in model.experts.parameters() if rank == 0 else ():
        p.allreduce = False  # type: ignore[attr-defined]
    watch = unseen(model, sgd(model), rank)
    assert not any(r.measured("grad_norm").any() for r in watch.history)
    dist.barrier()


TWO = {
    "marked-on-one-rank": marked_on_one_rank,
    "marked-by-allreduce": marked("allreduce"),
    "marked-for-ddp": marked("ignored"),
    "of-other-names": of_other_names,
    "mesh-1-2-1": on_a_mesh((1, 2, 1)),
}
FOUR = {"mesh-1-2-2": on_a_mesh((1, 2, 2)), "mesh-2-2-1": on_a_mesh((2, 2, 1))}
CASES = {**TWO, **FOUR}

if __name__ == "__main__":
    main(CASES)
