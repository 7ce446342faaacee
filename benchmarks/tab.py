"""What the tab costs over a long run: 500 layers, 50,000 steps, read from the run folder.

Run: python -m benchmarks.tab [--layers 500] [--steps 50000]

Writes a made-up run, then asks what a page asks: the first picture, ten zooms and ten moves, each as the browser would
over HTTP, without the drawing. Times are CPU seconds of the server's side; memory is what the process holds at the end.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time

import numpy as np
from werkzeug.test import Client

from gradwatch.cli._serve import make_app
from gradwatch.protocols import RunMeta
from gradwatch.records import Index, StepRecord
from gradwatch.sinks import RunFolder

FIRST = 1.5
MOVE = 0.15


def write(folder: Path, layers: int, steps: int) -> None:
    """Write a run of so many parameters and steps, with a spike in the middle."""
    index = Index.of_parameters([f"layers.{i}.weight" for i in range(layers)], numel=[4096] * layers)
    rng = np.random.default_rng(0)
    base = 10.0 ** rng.uniform(-4, -1, layers)
    sink = RunFolder(folder, limit_mb=4096)
    sink.open(RunMeta(model="Net"))
    for step in range(steps):
        norms = base * rng.uniform(0.5, 2.0, layers) * (1000.0 if step == steps // 2 else 1.0)
        total = float(np.sqrt(np.sum(norms**2)))
        record = StepRecord(
            step=step,
            index=index,
            time=1.7e9 + step,
            loss=4.0 / (1 + step / 1000),
            lr=1e-3,
            global_norm=total,
            global_norm_after=total,
            columns={"grad_norm": norms},
        )
        sink.write(record, [record])
    sink.close()


def timed(work: Callable[[], object]) -> float:
    began = process_time()
    work()
    return process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "1", options.layers, options.steps)
        size = sum(f.stat().st_size for f in (Path(folder) / "1").iterdir()) / 2**20
        report(Client(make_app(Path(folder))), options.layers, options.steps, size)


def report(client: Client, layers: int, steps: int, size: float) -> None:
    """Print what the page's questions cost."""

    def ask(route: str) -> None:
        answer = client.get(route, base_url="http://127.0.0.1")
        assert answer.status_code == 200, answer.text

    def matrix(first: float, last: float) -> None:
        ask(f"/matrix?run=1&statistic=grad_norm&from={first:.0f}&to={last:.0f}")
        ask(f"/headline?run=1&columns=4000&from={first:.0f}&to={last:.0f}")

    def picture() -> None:
        ask("/runs")
        ask("/run?run=1")
        matrix(0, steps)
        ask("/incidents?run=1")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    first = timed(picture)
    zooms = [timed(lambda k=k: matrix(steps / 2 - steps / 2**k, steps / 2 + steps / 2**k)) for k in range(1, 11)]
    moves = [timed(lambda k=k: matrix(steps * k / 20, steps * (k + 8) / 20)) for k in range(10)]
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    print(f"{layers} layers, {steps:,} steps, folder of {size:.0f} MB; CPU time of the server's side\n")
    print("| question | time | bound |")
    print("|---|---|---|")
    print(f"| first picture | {first:.2f} s | {FIRST} s |")
    print(f"| zoom, median of 10 | {1000 * statistics.median(zooms):.0f} ms | {1000 * MOVE:.0f} ms |")
    print(f"| zoom, longest | {1000 * max(zooms):.0f} ms | |")
    print(f"| move, median of 10 | {1000 * statistics.median(moves):.0f} ms | {1000 * MOVE:.0f} ms |")
    print(f"| move, longest | {1000 * max(moves):.0f} ms | |")
    print(f"| memory beyond what was there before | {held:.0f} MB | |")


if __name__ == "__main__":
    main()
