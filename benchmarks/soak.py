"""Ten thousand steps of a small model: memory, files and time per step stay flat. `python benchmarks/soak.py`."""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from gradwatch import Watch

__all__ = ["soak"]


def soak(steps: int, folder: Path, parts: int = 5) -> list[dict[str, float]]:
    """Train, and return for each part of the run: resident MB at its end, bytes written, median milliseconds a step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(inplace=True), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = []
    with Watch(model, optimizer, rules="autoclip", run_dir=folder, history=200) as watch:
        for _ in range(parts):
            times = []
            for _ in range(steps // parts):
                x = torch.randn(16, 20)
                begun = time.perf_counter()
                loss = (model(x) - x.sum(1, keepdim=True).sin()).square().mean()
                loss.backward()
                watch.step(loss=loss)
                optimizer.zero_grad()
                times.append(time.perf_counter() - begun)
            gc.collect()
            watch.session.sinks.flush()
            written = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
            rows.append({"mb": resident_mb(), "bytes": written, "ms": 1e3 * sorted(times)[len(times) // 2]})
    return rows


def resident_mb() -> float:
    """Return resident memory now, or its peak where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        rows = soak(options.steps, Path(place))
    print("| steps | resident MB | bytes written | ms a step (median) |\n|---|---|---|---|")
    for i, row in enumerate(rows):
        print(f"| {(i + 1) * options.steps // len(rows)} | {row['mb']:.1f} | {row['bytes']:,} | {row['ms']:.2f} |")


if __name__ == "__main__":
    main()
