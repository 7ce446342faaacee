"""How the cost of measuring every gradient grows with the number of elements and of tensors.

    python benchmarks/scale.py [--device cpu|cuda] [--rounds 7] [--most-elements 100000000]
    python benchmarks/scale.py --experts [--steps 48] [--layers 60] [--run-dir FOLDER] [--no-gc]

Arms run in turns in one process (CPU time; event time on CUDA). A straight line, cost = a + b x tensors + c x elements,
is fitted to the medians: b is the price of one more tensor, c that of a million more elements.

With `--experts` a whole `Watch` at defaults looks after a mixture of 64 experts of three tiny tensors each in 60
layers, 11,520 parameters: printed are the CPU milliseconds that watching adds to a step, the memory that the columns of
the history take, and what a run folder takes on disk. A bare training of the like takes turns with it, step by step,
and its backward and optimizer's step are subtracted. After the first third of the steps the median is that of a step
at which norms alone are due, and the mean holds the sampled ones as well (modules, updates, histograms: the powers of
two at first, one step in 50 later), which are more in a short run than in a long one; of all sampled steps but the
first the median is printed, too. With `--no-gc` Python collects no garbage meanwhile: what a sampled step leaves calls
for a pass over all that the process holds, which takes longer than its measurements.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from gradwatch import Watch
from gradwatch.stats import Gradients, kernel_backends


def parameters(elements: int, tensors: int, device: str) -> list[tuple[str, torch.nn.Parameter]]:
    size = max(elements // tensors, 1)
    named = [(f"p{i}", torch.nn.Parameter(torch.zeros(size, device=device))) for i in range(tensors)]
    for _, p in named:
        p.grad = torch.full_like(p, 1e-3)
    return named


def arms_for(named: list[tuple[str, torch.nn.Parameter]]) -> dict[str, Callable[[], object]]:
    def floor() -> object:
        norms = torch.stack(torch._foreach_norm([p.grad for _, p in named]))
        return torch.cat([norms, norms.norm()[None]]).cpu()

    def norms() -> object:
        grads = Gradients.collect(named)
        return torch.cat([grads.norms, grads.global_norm[None]]).cpu()

    def everything() -> object:
        grads = Gradients.collect(named)
        found = grads.measure(histograms=True)
        return torch.cat([found.norms, found.sums.flatten(), found.maxima.flatten(), grads.global_norm[None]]).cpu()

    return {"floor": floor, "norms": norms, "everything": everything}


def timed(fn: Callable[[], object], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    fn()
    return clock() - start


class Expert(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("up", "gate", "down"):
            setattr(self, name, torch.nn.Parameter(torch.randn(4, 4) * 0.1))


def mixture(layers: int) -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable[[], torch.Tensor]]:
    """Return a model of 64 experts a layer, its optimizer, and what makes its gradients and returns the loss."""
    torch.manual_seed(0)
    stacks = [torch.nn.ModuleList([Expert() for _ in range(64)]) for _ in range(layers)]
    model = torch.nn.ModuleList(stacks)
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=1e-3, foreach=True)

    def backward() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.cat([p.view(-1) for p in params]).square().mean()
        loss.backward()
        return loss

    return model, optimizer, backward


def experts(layers: int, steps: int, run_dir: str | None) -> None:
    _, bare_optimizer, bare_backward = mixture(layers)
    model, optimizer, backward = mixture(layers)
    num_paths = len(list(model.parameters()))
    added: dict[int, float] = {}
    with Watch(model, optimizer, run_dir=run_dir) as watch:
        for step in range(steps):
            start = time.process_time()
            bare_backward()
            bare_optimizer.step()
            between = time.process_time()
            watch.step(loss=backward())
            end = time.process_time()
            added[step] = (end - between - (between - start)) * 1e3
        records = list(watch.history)
        held = sum(column.nbytes for record in records for column in record.columns.values())
        start = time.process_time()
    ended = time.process_time() - start
    late = [ms for step, ms in added.items() if step >= steps // 3]
    sampled = [added[r.step] for r in records if r.step and len(r.columns) > 1]
    print(f"{num_paths} parameters, {steps} steps: added CPU ms a step, median {statistics.median(late):.1f},")
    print(f"mean {statistics.fmean(late):.1f}, of {len(sampled)} sampled ones {statistics.median(sampled):.0f}")
    print(f"{len(records)} records in memory, {held / 2**20:.1f} MiB of columns")
    print(f"{ended:.1f} s to end the watching")
    if run_dir is not None:
        size = sum(file.stat().st_size for file in Path(run_dir).rglob("*") if file.is_file())
        print(f"on disk {size / 2**20:.1f} MiB, {size / steps / 1024:.1f} KB a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--most-elements", type=int, default=100_000_000)
    parser.add_argument("--experts", action="store_true", help="a mixture of 64 experts in each of many layers")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--run-dir", default=None, help="record there, and print what it takes")
    parser.add_argument("--no-gc", action="store_true", help="collect no garbage meanwhile")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.no_gc:
        gc.disable()
    if options.experts:
        experts(options.layers, options.steps, options.run_dir)
        return
    sizes = [n for n in (10**5, 10**6, 10**7, 10**8) if n <= options.most_elements]
    cells = [(n, t) for n in sizes for t in (10, 100, 1000, 5000) if n // t >= 20]
    print(f"{options.device}, float32, kernels {kernel_backends()}; ms, medians of {options.rounds} rounds in turns")
    print(f"{'elements':>10} {'tensors':>8} {'floor':>9} {'norms':>9} {'x floor':>8} {'everything':>11} {'x floor':>8}")
    rows: dict[str, list[float]] = {"floor": [], "norms": [], "everything": []}
    for elements, tensors in cells:
        arms = arms_for(parameters(elements, tensors, options.device))
        times: dict[str, list[float]] = {name: [] for name in arms}
        for round_ in range(options.rounds + 1):
            for name, arm in arms.items():
                seconds = timed(arm, options.device)
                if round_:
                    times[name].append(seconds)
        for name, seconds in times.items():
            rows[name].append(statistics.median(seconds) * 1e3)
        ratio = {n: statistics.median([a / b for a, b in zip(times[n], times["floor"], strict=True)]) for n in times}
        print(
            f"{elements:>10} {tensors:>8} {rows['floor'][-1]:9.3f} {rows['norms'][-1]:9.3f} {ratio['norms']:8.2f} "
            f"{rows['everything'][-1]:11.3f} {ratio['everything']:8.2f}"
        )
    print(f"\n{'slopes':>10} {'us each call':>14} {'us each tensor':>16} {'ms each 1e6 elements':>22}")
    design = np.array([[1.0, t, n] for n, t in cells])
    for name, values in rows.items():
        weights = 1 / np.maximum(np.array(values), 1e-3)  # relative errors count, not those of the largest cell
        (each, tensor, element), *_ = np.linalg.lstsq(design * weights[:, None], np.array(values) * weights, rcond=None)
        print(f"{name:>10} {each * 1e3:14.1f} {tensor * 1e3:16.2f} {element * 1e6:22.3f}")


if __name__ == "__main__":
    main()
