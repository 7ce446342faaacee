"""Runs several training loops in turns within one process, and compares their CPU time round by round.

On a shared machine two runs one after the other differ by more than what is to be measured. Here every arm lives in its
own thread and waits for the baton before each block of steps; the ratio of one round's blocks cancels most of the
noise, and the median over rounds most of the rest.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Arm", "race", "table"]


@dataclass
class Arm:
    """One training loop.

    Attributes:
        name: in the table.
        run: called in a thread with an iterator of batches; trains until it is exhausted.
        steps: per round; fewer for slow arms.
    """

    name: str
    run: Callable[[Iterator[Any]], None]
    steps: int
    seconds: list[float] = field(default_factory=list)


class _Turns:
    """The batches of one arm; hands the baton back after each block."""

    def __init__(self, make_batch: Callable[[int], Any]) -> None:
        self.make_batch = make_batch
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.steps, self.finished, self.count = 0, False, 0
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.go.acquire()
            if self.finished:
                return
            for _ in range(self.steps):
                self.count += 1
                yield self.make_batch(self.count)
            self.done.release()

    def block(self, steps: int) -> float:
        """Let the arm take this many steps; return the process's CPU seconds."""
        start = time.process_time()
        self.steps = steps
        self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error
        return time.process_time() - start


def race(arms: list[Arm], make_batch: Callable[[int], Any], *, rounds: int, warmup: int) -> None:
    """Fill every arm's `seconds` per step, one entry per round."""
    turns = {arm.name: _Turns(make_batch) for arm in arms}

    def live(arm: Arm) -> None:
        mine = turns[arm.name]
        try:
            arm.run(iter(mine))
        except BaseException as error:
            mine.error = error
            mine.done.release()

    threads = {arm.name: threading.Thread(target=live, args=(arm,), daemon=True) for arm in arms}
    for arm in arms:
        threads[arm.name].start()
        turns[arm.name].block(min(warmup, max(arm.steps, 3)))
    for r in range(rounds):
        for arm in arms[:: 1 if r % 2 == 0 else -1]:
            arm.seconds.append(turns[arm.name].block(arm.steps) / arm.steps)
        shown = "  ".join(f"{a.name} {a.seconds[-1] * 1e3:.1f} ms" for a in arms)
        print(f"round {r + 1}/{rounds}: {shown}", flush=True)
    for arm in arms:
        turns[arm.name].finished = True
        turns[arm.name].go.release()
        threads[arm.name].join(timeout=120)


def table(arms: list[Arm], baseline: str) -> list[tuple[str, float, float, float, float]]:
    """Return name, median ratio to the baseline of the same round, its quartiles, and median milliseconds per step."""
    base = next(a for a in arms if a.name == baseline).seconds
    rows = []
    for arm in arms:
        ratios = [s / b for s, b in zip(arm.seconds, base, strict=True)]
        low, high = min(ratios), max(ratios)
        if len(ratios) > 3:
            low, _, high = statistics.quantiles(ratios, n=4)
        rows.append((arm.name, statistics.median(ratios), low, high, statistics.median(arm.seconds) * 1e3))
    return rows
