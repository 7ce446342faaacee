"""CPU time that case files add to a step in which nothing happens. Run: python benchmarks/cases.py

A step looks at its batch alone: whether it tells its samples, and with `save_batch` which tensors are to be held.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from gradwatch.watch._batches import Batches

STEPS = 20_000


def cost(batches: Batches, batch: Any) -> float:
    """Return microseconds of CPU time a step."""
    begin = time.process_time_ns()
    for step in range(STEPS):
        if batches.wants(batch):
            batches.see(batch)
        batches.stepped(step)
    return (time.process_time_ns() - begin) / STEPS / 1e3


def main() -> None:
    x, y, ids = torch.randn(32, 8), torch.randn(32, 1), torch.arange(32)
    kinds = {"a pair": (x, y), "a mapping": {"x": x, "y": y}, "a mapping that tells": {"x": x, "y": y, "idx": ids}}
    print("| batch | us a step | with save_batch |\n|---|---|---|")
    for name, batch in kinds.items():
        plain, saved = (cost(Batches(keeps=keeps, limit_bytes=1 << 26), batch) for keeps in (False, True))
        print(f"| {name} | {plain:.2f} | {saved:.1f} |")


if __name__ == "__main__":
    main()
