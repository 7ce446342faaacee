"""A sink that blocks, and twenty thousand tensors: what the training feels of them. `python benchmarks/blocked.py`.

The same steps are taken with a sink that takes at once, and with one that blocks for a while (a minute, unless told
otherwise) in the midst of them; then it is counted what each was handed. With `--tensors` it is the memory that a watch
of so many parameters of four numbers takes beside the bare loop.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradwatch import Watch
from gradwatch.sinks import MemorySink


class Blocking(MemorySink):
    """Blocks once, in its tenth call, for so many seconds."""

    never_hangs = False
    every = 1

    def __init__(self, seconds: float) -> None:
        super().__init__(max_records=1 << 20)
        self.seconds, self.began, self.ended = seconds, 0.0, 0.0

    def write(self, record: Any, window: Any = ()) -> None:
        if self.seconds and len(self.records) == 10:
            self.began = time.monotonic()
            threading.Event().wait(self.seconds)
            self.ended, self.seconds = time.monotonic(), 0.0
        super().write(record, window)


def blocked(seconds: float, pause: float = 0.02) -> dict[str, float]:
    """Train for as long as a sink blocks and a little longer; return what became of it.

    Args:
        seconds: that it blocks.
        pause: that a step takes at least, as of a training of some size: the queue holds 4,096 records.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sink, times, during = Blocking(seconds), [], []
    with warnings.catch_warnings(), Watch(model, optimizer, sinks=[sink], log_every=1) as watch:
        warnings.simplefilter("ignore")
        while sink.ended == 0 or time.monotonic() < sink.ended + 2:
            begun = time.perf_counter()
            loss = model(torch.randn(8, 8)).square().mean()
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
            is_blocked = sink.began > 0 and sink.ended == 0
            (during if is_blocked else times).append(time.perf_counter() - begun)
            time.sleep(pause)
    usual, meanwhile = sorted(times), sorted(during)
    return {
        "seconds blocked": seconds,
        "steps": len(times) + len(during),
        "steps while it blocked": len(during),
        "median ms a step, usual": 1e3 * usual[len(usual) // 2],
        "median ms a step, while it blocked": 1e3 * meanwhile[len(meanwhile) // 2],
        "longest ms of a step, while it blocked": 1e3 * meanwhile[-1],
        "records handed over": len(sink.records),
        "records lost": len(times) + len(during) - len(sink.records),
    }


def many(tensors: int, steps: int = 20) -> dict[str, float]:
    """Return the MB that a watch of so many parameters takes beside the bare loop, with a run folder."""
    model = nn.Module()
    model.ps = nn.ParameterList([nn.Parameter(torch.ones(4)) for _ in range(tensors)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def loss() -> torch.Tensor:
        found = torch.stack(list(model.ps)).square().sum()
        found.backward()
        return found

    for _ in range(3):
        loss()
        optimizer.step()
        optimizer.zero_grad()
    bare, peak = resident_mb(), peak_mb()
    found = {}
    with tempfile.TemporaryDirectory() as place:
        with Watch(model, optimizer, run_dir=place) as watch:
            for step in range(steps):
                watch.step(loss=loss())
                optimizer.zero_grad()
                if step + 1 in (1, steps // 2, steps):
                    found[f"MB above the bare loop, after {step + 1} steps"] = resident_mb() - bare
        written = sum(f.stat().st_size for f in Path(place).rglob("*") if f.is_file())
    return found | {
        "MB above the bare loop's peak, at most": peak_mb() - peak,
        "KB on disk, a step": written / 1024 / steps,
    }


def resident_mb() -> float:
    """Return resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tensors", type=int, default=0, help="measure memory with so many, and block nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = many(options.tensors) if options.tensors else blocked(options.seconds)
    for name, value in rows.items():
        print(f"{name:45}{value:12,.1f}")
    sys.exit(int(rows.get("records lost", 0) > 0))


if __name__ == "__main__":
    main()
