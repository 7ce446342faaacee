"""All that wants to be known of gradwatch on a GPU, in one run of less than eight minutes.

    python benchmarks/gpu.py                    # a table, also as --json FILE
    python benchmarks/gpu.py --dry              # all of it small, on the CPU: whether the script runs
    python benchmarks/gpu.py --only waits truth

Parts, in this order: `tests` runs `pytest -m gpu`; `waits` trains under torch's sync debug mode "error", and counts
numbers that were asked for before they had arrived; `truth` gives a training bad losses, and says what became of it;
`overhead` times steps of a GPT-2 of 124 M parameters in bfloat16, bare and under several monitors, with what each holds
in memory; `kernels` compares statistics of gradients with a copy. A part that fails is a row that says so, and the exit
code; one for which the minutes do not suffice is left out, and said to be.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _models import GPT
from torch import Tensor, nn

from gradwatch import Watch
from gradwatch.rules import Exploding
from gradwatch.stats import kernel_backends, kernel_faults, measure_gradients, tensor_norms
from gradwatch.treatments import ClipToLimit, SkipStep
from gradwatch.watch._transfer import Transfer

ROOT = Path(__file__).parents[1]
ALL = dict.fromkeys(("activations_every", "updates_every", "histograms_every"), 1)
Row = tuple[str, str]


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        model: arguments of the GPT.
        batch: (sequences, tokens).
        steps: of one timed arm; the last `timed` of them count.
        short: steps of a run that is not timed.
        learnt: steps after which rules know what is usual.
        elements: of a tensor that kernels read; `tensors` of them.
    """

    model: Mapping[str, int]
    batch: tuple[int, int]
    steps: int
    timed: int
    short: int
    learnt: int
    elements: int
    tensors: int


FULL = Size(
    {"dim": 768, "layers": 12, "heads": 12, "vocab": 50304, "context": 1024}, (8, 1024), 130, 100, 45, 40, 1 << 22, 64
)
SMALL = Size({"dim": 32, "layers": 2, "heads": 2, "vocab": 64, "context": 16}, (2, 16), 6, 3, 8, 35, 1 << 14, 4)


@dataclass
class Bench:
    """Where, and how large."""

    device: torch.device
    size: Size
    is_dry: bool
    deadline: float = math.inf
    failed: list[str] = field(default_factory=list)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def sync(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.is_cuda else 0

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.deadline - time.monotonic()


@dataclass
class Trained:
    """What one training showed.

    Attributes:
        gaps: milliseconds between the ends of the timed steps.
        first: seconds of the first two steps, in which kernels are compiled.
        held: bytes on the device after it, beyond those before the monitor was made.
        peak: the most bytes at any time.
    """

    model: nn.Module
    watch: Watch | None
    gaps: list[float]
    first: float
    held: int = 0
    peak: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.gaps)


Monitor = Callable[[nn.Module, torch.optim.Optimizer], Any]


def train(
    bench: Bench,
    steps: int,
    monitor: Monitor | None = None,
    *,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    faults: Mapping[int, float] | None = None,
    strict_from: int | None = None,
    **optimizer: Any,
) -> Trained:
    """Train the GPT for some steps.

    Args:
        monitor: makes of model and optimizer a `Watch`, or what is called in place of the optimizer's step.
        faults: step -> what its loss is multiplied by.
        strict_from: the step from which on torch raises where it sees the host wait.
    """
    torch.manual_seed(0)
    model = GPT(**bench.size.model).to(bench.device)
    model.head.weight = model.tokens.weight
    stepper = make(model.parameters(), lr=1e-4, **optimizer)
    codes = torch.randint(0, bench.size.model["vocab"], bench.size.batch, device=bench.device)
    before = bench.allocated()
    watch = None if monitor is None else monitor(model, stepper)
    ends: list[Any] = []
    stamps = [time.perf_counter()]
    for step in range(steps):
        if strict_from == step and bench.is_cuda:
            torch.cuda.set_sync_debug_mode("error")
        one_step(bench, model, stepper, watch, codes, (faults or {}).get(step, 1.0))
        ends.append(mark(bench))
        stamps.append(time.perf_counter())
    if bench.is_cuda:
        torch.cuda.set_sync_debug_mode("default")
    bench.sync()
    # Also once without them, so that every run holds its gradients, or none does.
    stepper.zero_grad()
    held = bench.allocated() - before
    gaps = [gap(bench, a, b) for a, b in zip(ends[-1 - bench.size.timed :], ends[-bench.size.timed :], strict=False)]
    if isinstance(watch, Watch):
        watch.close()
    peak = torch.cuda.max_memory_allocated() if bench.is_cuda else 0
    return Trained(model, watch if isinstance(watch, Watch) else None, gaps, stamps[2] - stamps[0], held, peak)


def one_step(
    bench: Bench, model: GPT, stepper: torch.optim.Optimizer, watch: Any, codes: Tensor, factor: float
) -> None:
    stepper.zero_grad()
    with torch.autocast(bench.device.type, torch.bfloat16):
        loss = model.loss(codes) * factor
    loss.backward()
    if isinstance(watch, Watch):
        watch.step(loss=loss, batch=codes)
        return
    if watch is not None:
        watch(loss)
    stepper.step()


def mark(bench: Bench) -> Any:
    if not bench.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def gap(bench: Bench, one: Any, other: Any) -> float:
    return float(one.elapsed_time(other)) if bench.is_cuda else (other - one) * 1e3


def watched(**options: Any) -> Monitor:
    return lambda model, stepper: Watch(model, stepper, on_error="raise", **options)


def tests(bench: Bench) -> Iterator[Row]:
    """`pytest -m gpu`; dry, only which tests there are."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "0", "-p", "no:cacheprovider"]
    # By name: collecting whole folders takes a minute.
    files = [str(f) for f in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in f.read_text(encoding="utf-8")]
    command += files + (["--collect-only"] if bench.is_dry else [])
    limit = max(10.0, min(170.0, bench.left()))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    lines = done.stdout.strip().splitlines()
    yield "pytest -m gpu", lines[-1] if lines else done.stderr[-200:]
    for line in [line for line in lines if line.startswith(("FAILED", "ERROR"))][:12]:
        yield "", line[:150]
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}")


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "everything at every step": (ALL, {}),
    "autoclip": ({"rules": "autoclip"}, {}),
    "autoclip, fused optimizer": ({"rules": "autoclip"}, {"fused": True}),
    "SkipStep, fused optimizer": ({"treatments": SkipStep()}, {"fused": True}),
    "Exploding, then ClipToLimit": ({"rules": [Exploding(then=ClipToLimit())]}, {}),
}
"""Name -> options of the watch, and of the optimizer."""


@contextmanager
def early_reads() -> Iterator[list[int]]:
    """Count numbers that were asked for before they had arrived: torch's debug mode does not see waits for events."""
    found = [0]
    original = Transfer.result

    def result(self: Transfer) -> dict[str, Any]:
        found[0] += not self.ready
        return original(self)

    Transfer.result = result  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Transfer.result = original  # type: ignore[method-assign]


def waits(bench: Bench) -> Iterator[Row]:
    for name, (options, optimizer) in WAYS.items():
        said = "no wait that torch sees"
        with early_reads() as found:
            try:
                train(bench, bench.size.short, watched(**options), strict_from=5, **optimizer)
            except RuntimeError as error:
                said = str(error).partition("\n")[0][:90]
            finally:
                if bench.is_cuda:
                    torch.cuda.set_sync_debug_mode("default")
        yield name, f"{said}; {found[0]} numbers asked for early in {bench.size.short} steps"


def truth(bench: Bench) -> Iterator[Row]:
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "AdamW": (torch.optim.AdamW, {}),
        "SGD": (torch.optim.SGD, {"momentum": 0.9}),
        "fused AdamW": (torch.optim.AdamW, {"fused": True}),
        "fused SGD": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    }
    for name, (make, options) in ways.items():
        found = train(bench, 8, watched(treatments=SkipStep()), make=make, faults={0: math.nan, 5: math.nan}, **options)
        assert found.watch is not None
        skipped = [record.step for record in found.watch.history if record.skipped]
        finite = all(bool(p.isfinite().all()) for p in found.model.parameters())
        yield f"nan at 0 and 5, {name}", f"skipped {skipped}, weights {'finite' if finite else 'NOT FINITE'}"
        if skipped != [0, 5] or not finite:
            bench.failed.append("truth")
    last = bench.size.learnt
    found = train(bench, last + 3, watched(rules=[Exploding(then=ClipToLimit())]), faults={last: 1e4})
    assert found.watch is not None
    told = [(i.rule, i.first_step, i.treatments) for i in found.watch.incidents]
    yield f"a loss of 1e4 times its size at {last}", str(told)
    yield from on_two_devices(bench)


def on_two_devices(bench: Bench) -> Iterator[Row]:
    if torch.cuda.device_count() < 2:
        yield "a model over two devices", "not measured: there is one"
        return
    parts = nn.ModuleList(nn.Linear(64, 64).to(f"cuda:{i}") for i in range(2))
    stepper = torch.optim.SGD(parts.parameters(), lr=1e-3)
    with Watch(parts, stepper, on_error="raise") as watch:
        for _ in range(3):
            parts[1](parts[0](torch.randn(8, 64, device="cuda:0")).to("cuda:1")).sum().backward()
            watch.step()
            stepper.zero_grad()
    yield "a model over two devices", f"{len(watch.history)} records, norm {watch.history[-1].global_norm:.3g}"


def floor(model: nn.Module, stepper: Any) -> Callable[[Tensor], object]:
    """The least that any monitor must do: one packed norm and one read."""
    return lambda loss: torch.stack(torch._foreach_norm([p.grad for p in model.parameters()])).tolist()


def lightnings(model: nn.Module, stepper: Any) -> Callable[[Tensor], object]:
    """What `log_dict(grad_norm(...))` computes, and reads where a logger writes it."""
    from pytorch_lightning.utilities import grad_norm

    return lambda loss: {name: float(norm) for name, norm in grad_norm(model, norm_type=2).items()}


def wandbs(model: nn.Module, stepper: Any) -> Callable[[Tensor], object]:
    """`wandb.watch(log="gradients")` at its default of every 1,000 steps made one of ten, offline."""
    import wandb

    run = wandb.init(
        mode="offline", dir=tempfile.mkdtemp(), project="bench", settings={"silent": True}, reinit="finish_previous"
    )
    run.watch(model, log="gradients", log_freq=10)
    return lambda loss: run.log({"loss": loss.detach()})


def overhead(bench: Bench) -> Iterator[Row]:
    arms: dict[str, tuple[Monitor | None, dict[str, Any]]] = {
        "bare": (None, {}),
        "floor: `_foreach_norm`, one read": (floor, {}),
        "gradwatch, defaults": (watched(), {}),
        "gradwatch, autoclip": (watched(rules="autoclip"), {}),
        "gradwatch, everything every step": (watched(**ALL), {}),
        "`grad_norm` of Lightning, read": (lightnings, {}),
        "`wandb.watch`, every 10 steps": (wandbs, {}),
        "bare, fused": (None, {"fused": True}),
        "gradwatch with SkipStep, fused": (watched(treatments=SkipStep()), {"fused": True}),
    }
    kept: dict[str, Trained] = {}
    for name, (monitor, options) in arms.items():
        if bench.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            found = train(bench, bench.size.steps, monitor, **options)
        except ImportError as error:
            yield name, f"not measured: {error}"
            continue
        base = kept.setdefault("fused" if options else "plain", found)
        found.model, found.watch = nn.Identity(), None
        memory = f"held {mib(found.held - base.held)}, peak {mib(found.peak - base.peak)}"
        spread = f"worst {max(found.gaps):.1f}, first two steps {found.first:.1f} s"
        yield name, f"{found.median:.2f} ms, x {found.median / base.median:.3f}; {spread}; {memory}"
        gc.collect()


def kernels(bench: Bench) -> Iterator[Row]:
    for dtype in (torch.bfloat16, torch.float32):
        size = bench.size
        grads = [torch.randn(size.elements, device=bench.device).to(dtype) for _ in range(size.tensors)]
        twins = [torch.empty_like(g) for g in grads]
        arms: dict[str, Callable[[], object]] = {
            "copy": lambda g=grads, t=twins: torch._foreach_copy_(t, g),
            "_foreach_norm": lambda g=grads: torch._foreach_norm(g, 2, dtype=torch.float32),
            "tensor_norms": lambda g=grads: tensor_norms(g),
            "measure_gradients": lambda g=grads: measure_gradients(g),
            "with histograms": lambda g=grads: measure_gradients(g, histograms=True),
        }
        num_bytes = sum(g.nbytes for g in grads)
        for name, arm in arms.items():
            best, host = timed(bench, arm)
            # A copy reads and writes.
            rate = num_bytes * (2 if name == "copy" else 1) / best / 1e9
            yield (
                f"{str(dtype)[6:]}, {mib(num_bytes)}: {name}",
                f"{best * 1e3:.3f} ms, {rate:.0f} GB/s, host {host * 1e3:.3f} ms",
            )


def timed(bench: Bench, arm: Callable[[], object], rounds: int = 15) -> tuple[float, float]:
    """Return the least seconds until all is done, and the median of those until the host goes on."""
    arm()
    bench.sync()
    whole, host = [], []
    for _ in range(3 if bench.is_dry else rounds):
        start = time.perf_counter()
        arm()
        host.append(time.perf_counter() - start)
        bench.sync()
        whole.append(time.perf_counter() - start)
    return min(whole), statistics.median(host)


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"


PARTS: dict[str, tuple[Callable[[Bench], Iterator[Row]], float]] = {
    "tests": (tests, 20),
    "waits": (waits, 30),
    "truth": (truth, 30),
    "overhead": (overhead, 60),
    "kernels": (kernels, 10),
}
"""Name -> part, and the seconds that must be left for it to begin."""


def run_part(bench: Bench, name: str) -> Iterator[Row]:
    """Yield the rows of a part, what went wrong among them, and its time."""
    part, needs = PARTS[name]
    if bench.left() < needs:
        yield "", f"left out: {max(bench.left(), 0):.0f} seconds were left"
        return
    start, clock = time.monotonic(), time.process_time()
    try:
        yield from part(bench)
    except Exception as error:
        traceback.print_exc()
        bench.failed.append(name)
        yield "FAILED", f"{type(error).__name__}: {str(error)[:160]}"
    yield "", f"took {time.monotonic() - start:.0f} s, {time.process_time() - clock:.1f} of CPU here"
    gc.collect()
    if bench.is_cuda:
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="small, and on the CPU")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--json", type=Path, help="where the rows go, too")
    options = parser.parse_args()
    if not (options.dry or torch.cuda.is_available()):
        print("no CUDA device is at hand: nothing is measured. `--dry` runs all of it small, on the CPU.")
        return 2
    device = torch.device("cpu" if options.dry else "cuda")
    if options.dry:
        torch.set_num_threads(1)  # several would wait for each other longer than they work
    deadline = time.monotonic() + 60 * options.minutes
    bench = Bench(device, SMALL if options.dry else FULL, options.dry, deadline)
    name = "CPU, dry: no figure here means anything" if options.dry else torch.cuda.get_device_name()
    rows = [("machine", "device", name), ("machine", "torch", torch.__version__)]
    for part in options.only:
        for what, found in run_part(bench, part):
            rows.append((part, what, found))
            print(f"{part:9} {what:44} {found}", flush=True)
    # Known once they were asked for.
    rows.append(("machine", "kernels", f"{kernel_backends()} {'; '.join(kernel_faults())}"))
    print("\n| part | what | found |\n|---|---|---|")
    print("\n".join(f"| {part} | {what} | {found} |" for part, what, found in rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows))
    return int(bool(bench.failed))


if __name__ == "__main__":
    raise SystemExit(main())
