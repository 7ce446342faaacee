"""What gradient surgery costs: CPU time against forward + backward of the plain sum, and memory beside it.

Arms are surgery with one ordinary backward, with the probes combined directly, with Gramians of the last shared layer
and of the shared features, and torchjd's `mtl_backward`; on 2 and 8 tasks, at about 1 M and 10 M shared parameters,
batch 64, one thread. All arms take turns step by step.

```
python benchmarks/surgery.py            # some two minutes
python benchmarks/surgery.py --rounds 5 # rough
```
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from gradwatch.treatments.surgery import Surgery, SurgeryController

WIDTHS = {"1 M": 408, "10 M": 1290}
BATCH = 64
ARMS = ("plain sum", "one backward", "direct", "last layer", "features", "torchjd")
SETTINGS = {
    "one backward": {},
    "direct": {"combine": "direct"},
    "last layer": {"gramian": "last"},
    "features": {"gramian": "features"},
}
LIMITS = {("one backward", 2): 2.6, ("direct", 2): 1.9, ("last layer", 2): 1.35}


class Net(nn.Module):
    """Six square layers shared by small heads."""

    def __init__(self, width: int, tasks: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(width, width), nn.GELU())))
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(tasks))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = self.trunk(x)
        return features, [(head(features) - (-1) ** i).pow(2).mean() for i, head in enumerate(self.heads)]


def make(arm: str, width: int, tasks: int) -> Callable[[], None]:
    """Return one step of an arm, gradients included, optimizer excluded."""
    torch.manual_seed(0)
    net, x = Net(width, tasks), torch.randn(BATCH, width)
    controller = SurgeryController(Surgery("pcgrad", **SETTINGS.get(arm, {})), net.named_parameters())

    def plain() -> None:
        net.zero_grad()
        sum(net(x)[1]).backward()

    def torchjd() -> None:
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import jac_to_grad, mtl_backward

        net.zero_grad()
        features, losses = net(x)
        mtl_backward(losses, features=features)
        jac_to_grad(net.trunk.parameters(), PCGrad())

    def surgery() -> None:
        net.zero_grad()
        controller.backward({str(i): loss for i, loss in enumerate(net(x)[1])})

    return {"plain sum": plain, "torchjd": torchjd}.get(arm, surgery)


def race(width: int, tasks: int, rounds: int) -> dict[str, float]:
    """Return each arm's least CPU time of a step over the plain sum's: neighbours on a machine only add."""
    steps = {arm: make(arm, width, tasks) for arm in ARMS}
    taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(rounds + 1):
        for arm, step in steps.items():
            start = time.process_time()
            step()
            taken[arm].append(time.process_time() - start)
    return {arm: min(times[1:]) / min(taken["plain sum"][1:]) for arm, times in taken.items()}


def memory_line(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return float(line.split()[1]) / 1024
    return float("nan")


def peak(arm: str, width: int, tasks: int) -> float:
    """Return the MiB of resident memory that a first step needs at its peak beside the model, gradients included."""
    make(arm, 256, tasks)()
    step = make(arm, width, tasks)
    before = memory_line("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return memory_line("VmHWM") - before


def in_a_process(arm: str, width: int, tasks: int) -> float:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(peak, (arm, width, tasks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, batch {BATCH}; time as a multiple of the plain sum's, peak of a step")
    print(f"{'shared':>7} {'tasks':>5}  " + "  ".join(f"{arm:>16}" for arm in ARMS))
    missed = []
    # Before anything else runs here: the processes start with this one's memory.
    every = {(w, t, arm): in_a_process(arm, w, t) for w in WIDTHS.values() for t in (2, 8) for arm in ARMS}
    for size, width in WIDTHS.items():
        for tasks in (2, 8):
            peaks = {arm: every[width, tasks, arm] for arm in ARMS}
            ratios = race(width, tasks, rounds if size == "1 M" or tasks == 2 else max(3, rounds // 3))
            cells = [f"{ratios[arm]:5.2f} {peaks[arm]:6.0f} MiB" for arm in ARMS]
            print(f"{size:>7} {tasks:>5}  " + "  ".join(f"{cell:>16}" for cell in cells), flush=True)
            for arm, ratio in ratios.items():
                limit = LIMITS.get((arm, tasks), float("inf"))
                if not ratio <= limit:
                    missed.append(f"{arm} at {size}, {tasks} tasks: {ratio:.2f} > {limit}")
                if arm in SETTINGS and not ratio < ratios["torchjd"]:
                    missed.append(f"{arm} at {size}, {tasks} tasks: {ratio:.2f}, torchjd {ratios['torchjd']:.2f}")
    print("\n".join(missed) or "every bound held")


if __name__ == "__main__":
    main()
