"""What two ranks run: one of them has the wrong sample."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradwatch import Watch
from tests.modes.ranks import main

from .faulty import RULES, SIZE, WHEN, WHO, data, network

HALF = SIZE // 2


def _train(rank: int, *, pieces: bool = False, breaks_on: int = -1) -> Watch:
    model = network()
    optimized = fully_shard(model) if pieces else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Watch(optimized, optimizer, rules=RULES, autopsy=True) as watch:
        for x, y in data(WHEN + 2, "target"):
            # The second rank has the first half, in which the wrong one is.
            mine = slice(HALF, None) if rank == 0 else slice(0, HALF)
            optimizer.zero_grad()
            loss = F.mse_loss(optimized(x[mine]), y[mine])
            loss.backward()
            if rank == breaks_on:
                watch.session.engine.guard.failed["telling samples apart"] = "broken"
            watch.step(loss, batch=(x[mine], y[mine]))
    return watch


def _samples(watch: Watch) -> list[dict]:
    return next(i for i in watch.incidents if i.rule == "exploding").details.get("samples", [])


def ddp(rank: int, world: int, folder: Path) -> None:
    samples = _samples(_train(rank))
    assert (samples[0]["rank"], samples[0]["index"]) == (1, WHO), samples
    assert samples[0]["share"] > 0.8, samples


def one_rank_can_not(rank: int, world: int, folder: Path) -> None:
    samples = _samples(_train(rank, breaks_on=0))
    assert {s["rank"] for s in samples} == {1}, samples
    assert samples[0]["index"] == WHO, samples


def in_pieces(rank: int, world: int, folder: Path) -> None:
    watch = _train(rank, pieces=True)
    assert not _samples(watch)
    assert any("gradients lie in pieces" in note for note in watch.session.notes), watch.session.notes


CASES = {"ddp": ddp, "one_rank_can_not": one_rank_can_not, "in_pieces": in_pieces}

if __name__ == "__main__":
    main(CASES)
