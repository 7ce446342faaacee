"""Silent faults: bits flipped in weights, gradients and computations of one rank; data that come again.

Ranks are processes on this machine that talk by gloo.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradwatch import Watch

__all__ = ["rows"]

ROOT = Path(__file__).resolve().parents[1]
RULES = {"rules": ["rank_divergence", "recomputation_differs", "repeated_order", "same_batches_on_ranks"]}
STEPS, WHEN = 6, 4
BITS = 32
HEALTHY, RECOMPUTE = 3000, 10


def flip(tensor: Tensor, element: int, bit: int) -> None:
    """Flip one bit of a float32 number in memory."""
    words = tensor.detach().view(-1).numpy().view("int32")
    words[element] ^= -(2**31) if bit == 31 else 1 << bit


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bits: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bits = bits
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        of_weight = grad.mT @ x
        if ctx.bits:
            flip(of_weight, 5, ctx.bits.pop())
        return grad @ weight, of_weight, None


class Weak(nn.Module):
    """A linear layer whose backward flips one bit when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bits = nn.Parameter(torch.randn(32, 16) / 4), []

    def forward(self, x: Tensor) -> Tensor:
        return _Multiply.apply(x, self.weight, self.bits)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Weak(), nn.LayerNorm(32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 4))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(16, 16, generator=made), torch.randint(0, 4, (16,), generator=made)


def _train(rank: int, world: int, steps: int, fault: Callable[[int, nn.Module, str], object], **options: Any) -> Watch:
    model = network()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Watch(wrapped, optimizer, rules=RULES, activations_every=None, updates_every=None, **options) as watch:
        for step in range(steps):
            x, y = batch(step * world + rank)
            fault(step, model, "before")
            loss = F.cross_entropy(wrapped(x), y)
            optimizer.zero_grad()
            loss.backward()
            fault(step, model, "after")
            watch.step(loss)
    return watch


def planted(rank: int, world: int, kind: str, bit: int) -> tuple[bool, bool]:
    """Return whether a flipped bit was found at once, and whether its rank was named."""
    who = bit % world

    def fault(step: int, model: Any, when: str) -> None:
        if step != WHEN or rank != who:
            return
        if kind == "weight" and when == "before":
            flip(model[4].weight, 9, bit)
        elif kind == "gradient" and when == "after":
            flip(model[4].weight.grad, 9, bit)
        elif kind == "computation" and when == "before":
            model[0].bits.append(bit)

    every = {"recompute_every": 1} if kind == "computation" else {"replicas_every": 1}
    watch = _train(rank, world, STEPS, fault, **every)
    found = next((i for i in watch.incidents if i.rule in ("rank_divergence", "recomputation_differs")), None)
    if found is None or found.first_step != WHEN:
        return False, False
    return True, f"rank {who} " in found.message or f"(rank {who})" in found.message


def _group(world: int, what: str) -> Any:
    """Run something in several processes; return what the first one found."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks._beyond_silent", what, "--world", str(world), "--folder", folder]
        ranks = [subprocess.Popen([*command, "--rank", str(rank)], cwd=ROOT) for rank in range(world)]
        codes = [process.wait(900) for process in ranks]
        if any(codes):
            raise RuntimeError(f"{what} over {world} ranks ended with {codes}")
        return json.loads((Path(folder) / "found.json").read_text())


def _bits(rank: int, world: int) -> dict[str, tuple[int, int, int]]:
    found = {}
    for kind in ("weight", "gradient", "computation"):
        told = [planted(rank, world, kind, bit) for bit in range(BITS)]
        found[kind] = (sum(f for f, _ in told), sum(n for _, n in told), len(told))
    return found


def _healthy(rank: int, world: int) -> dict[str, float]:
    watch = _train(rank, world, HEALTHY // world, lambda *_: None, recompute_every=RECOMPUTE, replicas_every=1)
    return {"incidents": len(watch.incidents), "records": HEALTHY // world}


def _cost(rank: int, world: int) -> dict[str, float]:
    """Return what one step costs more where it is compared, run again or known again, in usual steps' time."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(8)], nn.Linear(256, 4))
    model.insert(0, nn.Linear(16, 256))
    wrapped = DistributedDataParallel(model) if world > 1 else model
    found = {}
    ways = {"replicas": {"replicas_every": 4}, "recompute": {"recompute_every": 4}, "fingerprints": {}}
    for name, options in ways.items() if world == 1 else [("replicas", ways["replicas"])]:
        spent: list[list[float]] = [[] for _ in range(4)]
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        off = {"replicas_every": None, "activations_every": None, "updates_every": None, "histograms_every": None}
        with Watch(wrapped, optimizer, rules=[], **{**off, **options, "fingerprints": name == "fingerprints"}) as watch:
            prints = watch.session.engine.fingerprints
            for step in range(480):
                is_due = step % 4 == 0
                if prints is not None:
                    prints.is_wanted = lambda is_due=is_due: is_due
                x, y = batch(step % 7 * world + rank)
                x, y = x.repeat(8, 1), y.repeat(8)
                begun = time.process_time()
                optimizer.zero_grad()
                loss = F.cross_entropy(wrapped(x), y)
                loss.backward()
                watch.step(loss)
                spent[step % 4].append(time.process_time() - begun)
        usual = statistics.median(spent[1][10:] + spent[2][10:])
        # Weights are looked at after the step before, too.
        more = statistics.median(spent[0][10:]) + statistics.median(spent[3][10:]) - 2 * usual
        found[name] = more / usual
    return found


def _data() -> Iterator[tuple[str, str, str]]:
    from torch.utils.data import DataLoader, TensorDataset

    def notes(**given: Any) -> int:
        torch.manual_seed(0)
        x, y = torch.randn(320, 16), torch.randint(0, 4, (320,))
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        with Watch(model, optimizer, rules=RULES, fingerprints=True) as watch:
            for _ in range(10):
                for inputs, targets in DataLoader(TensorDataset(x, y), 16, **given):
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(inputs), targets)
                    loss.backward()
                    watch.step(loss)
        return len(watch.incidents)

    is_noted, is_silent = notes() == 1, notes(shuffle=True) == 0
    yield (
        "silent: order the same in every epoch; shuffled anew",
        f"noted: {is_noted}; silent: {is_silent}",
        "noted; silent",
    )


def _hush() -> None:
    """Keep incidents, of which there are hundreds by right, from the terminal."""
    logging.getLogger("gradwatch").setLevel(logging.ERROR)


def rows() -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the table: what, found, asked for."""
    torch.set_num_threads(1)
    _hush()
    for world in (2, 4):
        for kind, (found, named, count) in _group(world, "bits").items():
            asked = "found and named" if kind != "gradient" or world > 2 else "found; named but for the last bits"
            yield (
                f"silent: a bit flipped in a {kind}, {world} ranks",
                f"found {found}/{count}, rank named {named}/{count}",
                asked,
            )
    for world in (1, 2, 4):
        told = _healthy(0, 1) if world == 1 else _group(world, "healthy")
        what = f"silent: false alarms, {world} rank{'s' if world > 1 else ''}"
        yield what, f"{told['incidents']} in {told['records']} steps, all compared", "0"
    alone, two = _cost(0, 1), _group(2, "cost")
    yield "silent: a step that is run again", f"{alone['recompute']:+.2f} steps", "about +1"
    yield "silent: a step whose batch is known again", f"{alone['fingerprints']:+.1%} of a step", ""
    yield "silent: a step whose copies are compared, 2 ranks", f"{two['replicas']:+.1%} of a step", ""
    yield from _data()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("bits", "healthy", "cost"))
    for name in ("rank", "world"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    _hush()
    dist.init_process_group(
        "gloo", init_method=f"file://{given.folder / 'store'}", rank=given.rank, world_size=given.world
    )
    found = {"bits": _bits, "healthy": _healthy, "cost": _cost}[given.what](given.rank, given.world)
    if given.rank == 0:
        (given.folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
