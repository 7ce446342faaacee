"""What watching adds to a step of a small model, where everything but Python is cheap.

```
python benchmarks/small.py            MLPs of 4, 16 and 64 tensors, 64 units, batches of 32, Adam
python benchmarks/small.py --steps 400
python benchmarks/small.py --calls    functions that a quiet step calls: the same under any load
```

A bare and a watched loop take turns step by step in one process, one arm after the other: two watched trainings in one
process would look after each other. Printed are CPU milliseconds after the first 200 steps: of the bare step, and added
by each arm, as the median of the differences within a turn and as their mean over whole cadences (with the steps at
which modules, histograms and updates are sampled), and the median ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from gradwatch import Watch

WARM_UP = 200
UNITS, BATCH, CLASSES = 64, 32, 10
ARMS = {"observe": "observe", "defaults": "default", "autoclip": "autoclip"}


def mlp(num_tensors: int) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [part for _ in range(num_tensors // 2 - 1) for part in (nn.Linear(UNITS, UNITS), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(UNITS, CLASSES))


def loop(num_tensors: int, rules: str | None) -> Callable[[], None]:
    """Return what takes one step of a training of its own."""
    model = mlp(num_tensors)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    watch = None if rules is None else Watch(model, optimizer, rules=rules)
    random = torch.Generator().manual_seed(1)
    teacher = torch.randn(UNITS, CLASSES, generator=random)

    def step() -> None:
        x = torch.randn(BATCH, UNITS, generator=random)
        loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1))
        loss.backward()
        if watch is None:
            optimizer.step()
        else:
            watch.step(loss=loss)
        optimizer.zero_grad()

    return step


class Added(NamedTuple):
    """Milliseconds of the bare step, and what watching adds: median, mean, and the median ratio."""

    bare: float
    median: float
    mean: float
    ratio: float


def measure(num_tensors: int, rules: str, steps: int) -> Added:
    loops = loop(num_tensors, None), loop(num_tensors, rules)
    turns: list[list[float]] = []
    for _ in range(WARM_UP + steps):
        times = []
        for step in loops:
            start = time.process_time_ns()
            step()
            times.append((time.process_time_ns() - start) / 1e6)
        turns.append(times)
    turns = turns[WARM_UP:]
    differences = [watched - bare for bare, watched in turns]
    return Added(
        bare=statistics.median(bare for bare, _ in turns),
        median=statistics.median(differences),
        mean=statistics.fmean(differences),
        ratio=statistics.median(watched / bare for bare, watched in turns),
    )


class Calls(NamedTuple):
    """Functions that a step calls, by what they are written in."""

    python: float
    c: float


def calls(num_tensors: int, rules: str | None, steps: int) -> Calls:
    """Return the median of a training's steps."""
    step, found = loop(num_tensors, rules), []
    for _ in range(WARM_UP):
        step()
    for _ in range(steps):
        counts = {"call": 0, "c_call": 0}

        def count(frame: Any, event: str, _: Any, counts: dict[str, int] = counts) -> None:
            if event in counts:
                counts[event] += 1

        sys.setprofile(count)
        step()
        sys.setprofile(None)
        found.append(counts)
    return Calls(*(statistics.median(counts[kind] for counts in found) for kind in ("call", "c_call")))


def print_calls(steps: int) -> None:
    print("| tensors | arm | added Python calls | added C calls |")
    print("|---|---|---|---|")
    for num_tensors in (4, 16, 64):
        bare = calls(num_tensors, None, steps)
        for name, rules in ARMS.items():
            watched = calls(num_tensors, rules, steps)
            figures = f"{watched.python - bare.python:.0f} | {watched.c - bare.c:.0f}"
            print(f"| {num_tensors} | {name} | {figures} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="after the warm-up; whole cadences are of 100")
    parser.add_argument("--calls", action="store_true", help="count the functions that a quiet step calls")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.calls:
        print_calls(min(options.steps, 50))
        return
    print("| tensors | bare ms | arm | added ms, median | added ms, mean | x bare step |")
    print("|---|---|---|---|---|---|")
    for num_tensors in (4, 16, 64):
        for name, rules in ARMS.items():
            added = measure(num_tensors, rules, options.steps)
            figures = f"{added.bare:.2f} | {name} | {added.median:.2f} | {added.mean:.2f} | {added.ratio:.2f}"
            print(f"| {num_tensors} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
