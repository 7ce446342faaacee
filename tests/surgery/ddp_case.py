"""What each of two gloo processes runs: fits with surgery and their references."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from gradwatch.treatments.surgery import Surgery, weights

from .conftest import batches, task_gramian
from .lightning_case import TwoHeadsModule, fit, watch

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
}


class ByHandOverRanks(TwoHeadsModule):
    """The reference: the Gramian is the mean of the ranks' own."""

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        a, b = self.net.losses(*batch)
        G = task_gramian((a, b), list(self.net.trunk.parameters()))
        dist.all_reduce(G)
        w = weights("pcgrad", G / dist.get_world_size(), step=self.global_step).tolist()
        return w[0] * a + w[1] * b


def halves() -> DataLoader[tuple[Tensor, ...]]:
    """Each rank reads its own half."""
    columns = [torch.cat(column) for column in zip(*batches(16), strict=True)]
    # Lightning puts a DistributedSampler in.
    return DataLoader(TensorDataset(*columns), batch_size=32)


def main(rank: int, folder: str, port: int) -> None:
    os.environ.update(
        LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    for name, options in CASES.items():
        runs = {
            "surgery": (TwoHeadsModule(), (watch(Surgery("pcgrad", keep_length=False)),)),
            "by_hand": (ByHandOverRanks(), ()),
            "direct": (TwoHeadsModule(), (watch(Surgery("pcgrad", keep_length=False, combine="direct")),)),
        }
        for kind, (module, callbacks) in runs.items():
            fit(module, callbacks, steps=8, devices=2, strategy="ddp", data=halves(), **options)
            torch.save(module.state_dict(), Path(folder) / f"{name}-{kind}-{rank}.pt")
            if callbacks:
                applied = [r.scalars.get("surgery_weight/a") for r in callbacks[0].history]
                torch.save(applied, Path(folder) / f"{name}-{kind}-{rank}-weights.pt")
    dist.barrier()
    dist.destroy_process_group()
