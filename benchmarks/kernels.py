"""What each statistic costs, beside the time that reading the bytes once takes.

    python benchmarks/kernels.py [--device cpu|cuda] [--elements 16777216] [--tensors 64] [--dtype float32]

Arms run in turns in one process; shown are medians of the ratios within each round, so that a machine busy with other
things slows all arms alike. Times are CPU time on the CPU and event time on CUDA. The limit is the bytes of the tensors
divided by the bandwidth of a large copy (which counts bytes read and written).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from gradwatch.stats import _native as native_module
from gradwatch.stats import exponent_histograms, gradient_details, kernel_backends, measure_gradients, tensor_norms


def naive_histogram(tensor: torch.Tensor) -> torch.Tensor:
    """bincount over a materialised tensor of exponents, as float32."""
    return torch.bincount((tensor.float().view(torch.int32).flatten() >> 23) & 0x1FF, minlength=512)


def without_native(fn: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        load, native_module._load = native_module._load, lambda: None  # type: ignore[assignment]
        try:
            return fn()
        finally:
            native_module._load = load

    return run


def timed(fn: Callable[[], object], device: str) -> float:
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.process_time()
    fn()
    return time.process_time() - start


def arms_for(grads: list[torch.Tensor], device: str) -> dict[str, Callable[[], object]]:
    arms: dict[str, Callable[[], object]] = {
        "floor: _foreach_norm": lambda: torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)),
        "tensor_norms": lambda: tensor_norms(grads),
        "gradient_details": lambda: gradient_details(grads),
        "exponent_histograms": lambda: exponent_histograms(grads),
        "measure_gradients, histograms": lambda: measure_gradients(grads, histograms=True),
        "naive: bincount of exponents": lambda: [naive_histogram(g) for g in grads],
    }
    if device == "cpu" and kernel_backends()["cpu"] == "native":
        arms["tensor_norms, torch alone"] = without_native(lambda: tensor_norms(grads))
        arms["gradient_details, torch alone"] = without_native(lambda: gradient_details(grads))
        arms["exponent_histograms, torch alone"] = without_native(lambda: exponent_histograms(grads))
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--tensors", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    size = options.elements // options.tensors
    grads = [torch.randn(size, device=options.device).mul_(1e-3).to(dtype) for _ in range(options.tensors)]
    num_bytes = sum(g.numel() * g.element_size() for g in grads)
    source = torch.empty(max(num_bytes, 1 << 26), dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    arms = {"copy": lambda: target.copy_(source), **arms_for(grads, options.device)}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(options.rounds + 2):
        for name, arm in arms.items():
            source.add_(1)  # what was read last is out of the cache
            seconds = timed(arm, options.device)
            if round_ >= 2:
                times[name].append(seconds)
    floor, naive = times["floor: _foreach_norm"], times["naive: bincount of exponents"]
    bandwidth = 2 * source.numel() / statistics.median(times["copy"])
    print(f"{options.device}, {options.elements:.3g} elements of {options.dtype} in {options.tensors} tensors")
    print(
        f"kernels: {kernel_backends()}; copy bandwidth {bandwidth / 1e9:.1f} GB/s, so that reading the gradients once"
    )
    print(f"takes {num_bytes / bandwidth * 1e3:.2f} ms\n")
    print(f"{'':34} {'ms':>8} {'GB/s':>7} {'of the limit':>13} {'x floor':>8} {'x naive':>8}")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        limit = num_bytes / bandwidth / middle
        ratios = [statistics.median([a / b for a, b in zip(seconds, base, strict=True)]) for base in (floor, naive)]
        rate = num_bytes / middle / 1e9
        print(f"{name:34} {middle * 1e3:8.2f} {rate:7.1f} {limit:13.0%} {ratios[0]:8.2f} {ratios[1]:8.2f}")


if __name__ == "__main__":
    main()
