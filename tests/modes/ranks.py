"""Starts processes that run cases together, and tells each case's outcome."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
Case = Callable[[int, int, Path], None]


def run_group(module: str, world: int, folder: Path, names: list[str], *, timeout: int = 280) -> dict[str, str]:
    """Run the cases of a module in `world` processes; return case -> "" or why it failed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    env |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", module, str(world), str(folder), *names]
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    with logs[0].open("w") as log:
        launcher = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    outcomes = {}
    for name in names:
        told = [folder / f"{name}.{rank}" for rank in range(world)]
        wrong = [f"rank {i}: {t.read_text() if t.exists() else 'did not finish'}" for i, t in enumerate(told)]
        outcomes[name] = "\n".join(w for w in wrong if not w.endswith(": ok"))
    if any(outcomes.values()):
        outcomes = {n: w and f"{w}\n{logs[0].read_text()[-3000:]}" for n, w in outcomes.items()}
    return outcomes


def main(cases: Mapping[str, Case], backend: str = "gloo") -> None:
    """Run the cases named on the command line, in forks of a process that has imported what they need, once for all."""
    world, folder, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    gc.freeze()
    children = []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            with (folder / f"rank{rank}.log").open("ab", 0) as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            run_cases(cases, names, rank, world, folder, backend)
            code = 0
        except BaseException:  # whatever it is, it must not run on in a second copy of the launcher
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    for child in children:
        os.waitpid(child, 0)


def run_cases(cases: Mapping[str, Case], names: list[str], rank: int, world: int, folder: Path, backend: str) -> None:
    """Run some cases as one of the processes."""
    # What torchrun sets: Lightning then takes this process as one that was started for it.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "29500", "GROUP_RANK": "0"}
    dist.init_process_group(
        backend,
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=40),
    )
    for name in names:
        place = folder / name
        place.mkdir(exist_ok=True)
        try:
            cases[name](rank, world, place)
            said = "ok"
        except Exception:
            said = traceback.format_exc(limit=-6)[-3000:]
        (folder / f"{name}.{rank}").write_text(said)
        # All know of a failure before they go on: one that is late in a collective would mix up the next case.
        failed = [None] * world
        try:
            dist.all_gather_object(failed, said)
        except Exception:
            break
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


@contextmanager
def counted() -> Iterator[list[tuple[str, int, int]]]:
    """Note every all-reduce made inside: (operation, elements, ranks)."""
    made: list[tuple[str, int, int]] = []
    original = dist.all_reduce

    def all_reduce(tensor: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, **kwargs: Any) -> Any:
        made.append((str(op).rpartition(".")[2], tensor.numel(), dist.get_world_size(group)))
        return original(tensor, op=op, group=group, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield made
    finally:
        dist.all_reduce = original


def equal_on_all_ranks(value: Any) -> None:
    """Assert that every rank holds an equal value."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    for rank, other in enumerate(values):
        assert other == value, f"rank {rank} holds another value: {_first_difference(value, other)}"


def _first_difference(a: Any, b: Any) -> str:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for x, y in zip(a, b, strict=True):
            if x != y:
                return _first_difference(x, y)
    return f"{a!r} against {b!r}"[:600]
