"""Runs that are killed, interrupted, or whose disk fails, at random: what is on record. `python benchmarks/chaos.py`.

Sixty trainings, each in a process of its own: 30 meet SIGKILL, 10 SIGTERM, 10 SIGINT (in every phase of a step, and
while the run is closed), 10 a disk that is full, or fails, for a while. Every one is read back and compared with what
the training had done by then, and with the same training unwatched, bit by bit.
"""

from __future__ import annotations

import argparse
import errno
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradwatch import Watch
from gradwatch.protocols import RunMeta
from gradwatch.runs import read_run
from gradwatch.sinks import RunFolder, _journal, _recorder

STEPS = 300
PHASES = ("forward", "backward", "measuring", "optimizer", "between", "folding", "closing")
STATUS = struct.Struct("<qqq")
"""Steps done, checksum of the weights after them, hooks left (-1: not counted)."""


@dataclass
class Case:
    """One run, and what is to happen to it at which step."""

    kind: str
    phase: str
    step: int
    number: int


def cases(seed: int, scale: float) -> list[Case]:
    """Return what happens to each run."""
    draw = random.Random(seed)
    counts = {"SIGKILL": 30, "SIGTERM": 10, "SIGINT": 10, "disk": 10}
    found: list[Case] = []
    for kind, count in counts.items():
        for i in range(max(1, round(count * scale))):
            phase = PHASES[i % len(PHASES)] if kind == "SIGINT" else "anywhere"
            if kind == "disk":
                phase = ("ENOSPC", "EIO")[i % 2]
            found.append(Case(kind, phase, draw.randrange(20, STEPS - 40), len(found)))
    return found


class Training:
    """A small model and its steps; tells of each in memory that outlives it."""

    def __init__(self, shared: mmap.mmap | None, case: Case | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.shared, self.case, self.now = shared, case, 0
        self.checksums = [self.checksum()]

    def checksum(self) -> int:
        data = b"".join(p.detach().numpy().tobytes() for p in self.model.parameters())
        return zlib.crc32(data)

    def meet(self, phase: str) -> None:
        """Raise the signal that is due in this phase of this step."""
        case = self.case
        if case is not None and case.kind == "SIGINT" and (phase, self.now) == (case.phase, case.step):
            os.kill(os.getpid(), signal.SIGINT)

    def run(self, step: Callable[[torch.Tensor], object]) -> None:
        generator = torch.Generator().manual_seed(1)
        for self.now in range(STEPS):
            x = torch.randn(8, 8, generator=generator)
            self.meet("forward")
            output = self.model(x)
            output.register_hook(lambda _: self.meet("backward"))
            loss = (output - x.sum(1, keepdim=True).sin()).square().mean()
            loss.backward()
            step(loss.detach())
            self.optimizer.zero_grad()
            self.tell(self.now + 1, -1)
            self.meet("between")

    def tell(self, done: int, hooks: int) -> None:
        self.checksums.append(self.checksum())
        if self.shared is not None:
            STATUS.pack_into(self.shared, 0, done, self.checksums[-1], hooks)

    def hooks_left(self) -> int:
        places: list[Any] = [*self.model.modules(), self.optimizer]
        tables = [v for place in places for k, v in vars(place).items() if "hook" in k and isinstance(v, dict)]
        return sum(map(len, tables))


def watched(case: Case, folder: Path, shared: mmap.mmap) -> None:
    """Train watched, and let happen what is to happen from inside."""
    training = Training(shared, case)
    inject(training, case, folder)
    done = 0
    with suppress(KeyboardInterrupt), Watch(training.model, training.optimizer, run_dir=folder) as watch:
        training.run(lambda loss: watch.step(loss=loss))
    done = STATUS.unpack_from(shared, 0)[0]
    STATUS.pack_into(shared, 0, done, training.checksums[done], training.hooks_left())


def inject(training: Training, case: Case, folder: Path) -> None:
    """Put in what strikes inside gradwatch: signals in its own phases, writes that fail."""
    if case.phase in ("measuring", "optimizer"):
        optimizer = training.optimizer
        real = optimizer.step

        def step(*arguments: Any, **more: Any) -> Any:
            training.meet(case.phase)
            return real(*arguments, **more)

        optimizer.step = step  # type: ignore[method-assign]
    if case.phase == "folding":
        fold = _recorder.Recorder._fold

        def folding(self: Any) -> None:
            training.meet("folding")
            fold(self)

        _recorder.Recorder._fold = folding  # type: ignore[method-assign]
    if case.phase == "closing":
        close = _recorder.Recorder.close

        def closing(self: Any) -> None:
            if not getattr(self, "_struck", False):
                self._struck = True
                os.kill(os.getpid(), signal.SIGINT)
            close(self)

        _recorder.Recorder.close = closing  # type: ignore[method-assign]
    if case.kind == "disk":
        write, code = os.write, getattr(errno, case.phase)

        def failing(file: int, data: Any) -> int:
            is_ours = str(folder) in str(Path(f"/proc/self/fd/{file}").readlink())
            if is_ours and case.step <= training.now < case.step + 30:
                raise OSError(code, os.strerror(code))
            return write(file, data)

        os.write = failing


def one(case: Case, place: Path, unwatched: list[int], draw: random.Random) -> dict[str, Any]:
    """Run one case in a process of its own, and return what became of it."""
    folder = place / f"run-{case.number}"
    shared = mmap.mmap(-1, STATUS.size)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setpgid(0, 0)
            sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
            warnings.simplefilter("ignore")
            watched(case, folder, shared)
            status = 0
        finally:
            os._exit(status)
    if case.kind in ("SIGKILL", "SIGTERM"):
        while STATUS.unpack_from(shared, 0)[0] < case.step and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.0005)
        time.sleep(draw.random() * 0.005)
        os.kill(child, getattr(signal, case.kind))
    with suppress(ChildProcessError):
        os.waitpid(child, 0)
    done, checksum, hooks = STATUS.unpack_from(shared, 0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            run = read_run(folder)
            steps, health = run.steps().tolist(), run.health
        except Exception as error:
            return {"case": case, "readable": False, "why": repr(error), "done": done}
    missing = done - len([s for s in steps if s < done])
    return {
        "case": case,
        "readable": True,
        "done": done,
        "lost": missing - health.num_missing,
        "gap": health.num_missing,
        "told": len(told),
        "health": str(health),
        "hooks": max(hooks, 0),
        "equal": checksum == unwatched[done],
    }


def journal_cost(steps: int = 300) -> dict[str, float]:
    """Return the microseconds of CPU that a step of 100 paths spends on being on record, medians: in real steps,
    of that the system's own `write`; and the same record again and again, with all that it needs in the cache."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(50)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    # A step is kept twice: as its numbers arrive, and when it was judged.
    spent: dict[int, float] = {}
    keep, write, written = _recorder.Recorder.keep, os.write, []
    records: list[Any] = []

    def timed_write(file: int, data: Any) -> int:
        begun = time.thread_time()
        done = write(file, data)
        written.append(time.thread_time() - begun)
        return done

    def timed(self: Any, record: Any, *, is_early: bool = False) -> None:
        begun = time.thread_time()
        keep(self, record, is_early=is_early)
        spent[record.step] = spent.get(record.step, 0.0) + time.thread_time() - begun
        records[:] = [record]

    _recorder.Recorder.keep = timed  # type: ignore[method-assign]
    _journal.os.write = timed_write  # type: ignore[attr-defined]
    try:
        with tempfile.TemporaryDirectory() as place, Watch(model, optimizer, rules="observe", run_dir=place) as watch:
            for _ in range(steps):
                loss = model(torch.randn(4, 8)).square().mean()
                loss.backward()
                watch.step(loss=loss)
                optimizer.zero_grad()
    finally:
        _recorder.Recorder.keep = keep  # type: ignore[method-assign]
        os.write = write
    return {
        "in real steps": _median(list(spent.values())),
        "of that the system's write": _median(written),
        "in a loop": _median(_kept_again(records[0], steps)),
    }


def _kept_again(record: Any, times: int) -> list[float]:
    spent = []
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(place)
        folder.open(RunMeta())
        for step in range(times):
            given = replace(record, step=step)
            begun = time.thread_time()
            folder.write(given)
            spent.append(time.thread_time() - begun)
        folder.close()
    return spent


def _median(seconds: list[float]) -> float:
    return 1e6 * sorted(seconds)[len(seconds) // 2]


def tell_cost() -> None:
    for where, microseconds in journal_cost().items():
        print(f"microseconds a step of 100 paths, to be on record, {where:28}{microseconds:6.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="how many runs of each kind, relative to the sixty")
    parser.add_argument("--cost", action="store_true", help="only what it costs a step to be on record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cost:
        tell_cost()
        return 0
    bare = Training(None)
    bare.run(lambda _: bare.optimizer.step())
    draw, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as place:
        for case in cases(options.seed, options.scale):
            row = one(case, Path(place), bare.checksums, draw)
            rows.append(row)
            shown = "ok" if row["readable"] and not row["lost"] and row["equal"] else "NOT WELL"
            words = {k: v for k, v in row.items() if k not in ("case", "readable")}
            print(f"{case.kind:8}{case.phase:10} step {case.step:3}  {shown:9}{words}", flush=True)
    read = [row for row in rows if row["readable"]]
    print(f"runs                     {len(rows)}")
    print(f"readable                 {len(read)}")
    print(f"steps lost in silence    {sum(row['lost'] for row in read)}")
    print(f"steps missing, and told  {sum(row['gap'] for row in read)}")
    print(f"hooks left               {sum(row['hooks'] for row in read)}")
    print(f"bitwise equal            {sum(row['equal'] for row in read)}")
    tell_cost()
    is_well = len(read) == len(rows) and all(r["equal"] and not r["lost"] and not r["hooks"] for r in read)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
