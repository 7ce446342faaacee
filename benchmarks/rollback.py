"""What a return to a snapshot saves of a run whose learning rate jumps, and what snapshots cost a healthy one.

    python benchmarks/rollback.py                 # some minutes
    python benchmarks/rollback.py --seeds 1 --ranks 1
    python benchmarks/rollback.py --only cost

A GPT of 29,000 parameters learns to continue sequences of a random grammar, with AdamW and a cosine schedule, for 1,000
steps. At step 300 its learning rate jumps sixtyfold for 20 steps, by global step: whoever goes back meets the rest of
the jump again. The table shows the loss on held-out sequences at the end, median over seeds, and how far it is from
that of the undisturbed run. With two processes the same under DDP (gloo), each with batches of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import logging
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _models import GPT
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gradwatch import Watch
from gradwatch.errors import TrainingStopped
from gradwatch.rules import LossSpike
from gradwatch.treatments import ClipByGlobalNorm, LowerLearningRate, Rollback

STEPS, JUMP, LENGTH, FACTOR = 1000, 300, 20, 60.0
VOCAB, CONTEXT, BATCH, RATE = 32, 17, 16, 3e-3


def spike() -> LossSpike:
    return LossSpike(then=Rollback(steps=100, then=LowerLearningRate(0.05, steps=50)))


ARMS: dict[str, tuple[str, bool, Callable[[], dict[str, Any]] | None]] = {
    "undisturbed": ("undisturbed", False, None),
    "unwatched": ("the jump, unwatched", True, None),
    "clipped": ("the jump, ClipByGlobalNorm(1.0)", True, lambda: {"rules": [], "treatments": ClipByGlobalNorm(1.0)}),
    "rollback": ("the jump, LossSpike(then=Rollback(steps=100, ...))", True, lambda: {"rules": [spike()]}),
    "healthy": ("undisturbed, LossSpike(then=Rollback(steps=100, ...))", False, lambda: {"rules": [spike()]}),
}


class Grammar:
    """Sequences in which each symbol says how likely the next one is."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = (torch.randn(VOCAB, VOCAB, generator=generator) * 3).softmax(-1)

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        codes = torch.zeros(size, CONTEXT, dtype=torch.long)
        codes[:, 0] = torch.randint(0, VOCAB, (size,), generator=generator)
        for place in range(1, CONTEXT):
            rows = self.table[codes[:, place - 1]]
            codes[:, place] = torch.multinomial(rows, 1, generator=generator).squeeze(1)
        return codes


def rate(step: int, jumps: bool) -> float:
    factor = FACTOR if jumps and JUMP <= step < JUMP + LENGTH else 1.0
    return factor * RATE * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def train(arm: str, seed: int, rank: int = 0, world: int = 1) -> dict[str, float]:
    """Return the loss on held-out sequences at the end, and what was seen on the way."""
    _, jumps, options = ARMS[arm]
    torch.manual_seed(seed)
    grammar, net = Grammar(seed), GPT(dim=32, layers=2, heads=2, vocab=VOCAB, context=CONTEXT)
    model = DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.1)
    data = torch.Generator().manual_seed(1000 * seed + rank)
    found = {"returns": 0.0, "held": 0.0, "bound": math.nan}
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(Watch(model, optimizer, **options())) if options is not None else None
        with contextlib.suppress(TrainingStopped):
            for step in range(STEPS):
                for group in optimizer.param_groups:
                    group["lr"] = rate(step, jumps)
                codes = grammar.batch(BATCH // world, data)
                logits = model(codes[:, :-1])
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten())
                loss.backward()
                if watch is None:
                    optimizer.step()
                else:
                    watch.step(loss=loss)
                    note(watch, found)
                optimizer.zero_grad()
        if watch is not None:
            found["returns"] = float(sum("rolled_back_to" in i.details for i in watch.incidents))
    found["loss"] = held_out(net, grammar)
    return found


def note(watch: Watch, found: dict[str, float]) -> None:
    rollbacks = watch.session.engine.rollbacks
    if rollbacks is not None:
        snapshots = rollbacks.snapshots
        found["held"] = max(found["held"], len(snapshots.held) * snapshots.num_bytes / 2**20)
        found["bound"] = snapshots.plan.limit_bytes / 2**20


@torch.no_grad()
def held_out(net: GPT, grammar: Grammar) -> float:
    loss = float(net.loss(grammar.batch(512, torch.Generator().manual_seed(7))))
    return loss if math.isfinite(loss) else math.inf


def of_ranks(rank: int, world: int, arms: list[str], seeds: int, folder: str) -> None:
    quiet()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )
    results = {arm: [train(arm, seed, rank, world) for seed in range(seeds)] for arm in arms}
    every: list[Any] = [None] * world
    dist.all_gather_object(every, results)
    assert all([r["loss"] for r in runs[a]] == [r["loss"] for r in results[a]] for runs in every for a in arms)
    if rank == 0:
        torch.save(results, Path(folder, "results.pt"))
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may still hold tensors: a dying interpreter aborts at that


def run_arms(arms: list[str], seeds: int, ranks: int) -> dict[str, list[dict[str, float]]]:
    if ranks == 1:
        return {arm: [train(arm, seed) for seed in range(seeds)] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(of_ranks, (ranks, arms, seeds, folder), nprocs=ranks)
        found: dict[str, list[dict[str, float]]] = torch.load(Path(folder, "results.pt"), weights_only=True)
        return found


def table(results: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    yield "| run | final loss | of undisturbed | returns | snapshots held, MiB | bound, MiB |"
    yield "|---|---:|---:|---:|---:|---:|"
    plain = [run["loss"] for run in results["undisturbed"]]
    for arm, runs in results.items():
        loss = statistics.median(run["loss"] for run in runs)
        off = statistics.median(run["loss"] / own - 1 for run, own in zip(runs, plain, strict=True))
        returns = "/".join(f"{run['returns']:.0f}" for run in runs)
        held, bound = max(run["held"] for run in runs), runs[0]["bound"]
        shown = f"{held:.1f} | {bound:.0f}" if math.isfinite(bound) else "- | -"
        yield f"| {ARMS[arm][0]} | {loss:.4f} | {off:+.1%} | {returns} | {shown} |"


def cost(steps: int = 240, warm: int = 20) -> Iterator[str]:
    """Time steps of a healthy run with snapshots every 100 steps, and with none, in turns."""
    yield "| 16.9 M parameters, AdamW | ms a step | snapshot, ms | MiB held |"
    yield "|---|---:|---:|---:|"
    for name, options in (
        ("default rules", {"rules": "default"}),
        ("and a rollback", {"rules": [LossSpike(then=Rollback(steps=100))]}),
    ):
        torch.manual_seed(0)
        net = GPT()
        optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
        codes, spent, taken = torch.randint(0, 1500, (1, 17)), [], []
        with Watch(net, optimizer, **options) as watch:
            rollbacks = watch.session.engine.rollbacks
            for _ in range(steps):
                began = time.perf_counter()
                loss = net.loss(codes)
                loss.backward()
                watch.step(loss=loss)
                optimizer.zero_grad()
                spent.append(time.perf_counter() - began)
            if rollbacks is not None:
                for step in (10**6, 10**6 + 1, 10**6 + 2):
                    began = time.perf_counter()
                    rollbacks.snapshots.take(step)
                    taken.append(time.perf_counter() - began)
        held = 0.0 if rollbacks is None else 2 * rollbacks.snapshots.num_bytes / 2**20
        last = f"{1e3 * taken[-1]:.0f}" if taken else "-"
        yield f"| {name} | {1e3 * statistics.median(spent[warm:]):.1f} | {last} | {held:.0f} |"


def quiet() -> None:
    torch.set_num_threads(1)
    logging.getLogger("gradwatch").setLevel(logging.ERROR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--only", nargs="*", choices=[*ARMS, "cost"], default=[*ARMS, "cost"])
    options = parser.parse_args()
    quiet()
    arms = [arm for arm in ARMS if arm in options.only or (arm == "undisturbed" and set(options.only) != {"cost"})]
    for ranks in options.ranks if arms else ():
        print(f"\n{ranks} process{'es' if ranks > 1 else ''}, {options.seeds} seeds\n")
        for line in table(run_arms(arms, options.seeds, ranks)):
            print(line, flush=True)
    if "cost" in options.only:
        print()
        for line in cost():
            print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
