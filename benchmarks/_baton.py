"""Runs several training loops in turns within one process, and compares their CPU time round by round.

On a shared machine two runs one after the other differ by more than what is to be measured, and so do blocks of many
seconds. Here every arm lives in its own thread and waits for the baton before each single step, so that a slow second
falls on all arms alike; the ratio of one round's sums cancels most of the noise, and the median over rounds the rest.

An arm is charged with the CPU time of its own thread and of every thread that appeared during its steps (a logger's
writer, say), at whatever time those ran.
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
        seconds: CPU seconds per step, one entry per round.
        share: CPU seconds per step over those of the baseline at the same turns, one entry per round.
    """

    name: str
    run: Callable[[Iterator[Any]], None]
    steps: int
    seconds: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)


class _Turns:
    """The batches of one arm; hands the baton back after each step."""

    def __init__(self, arm: Arm, make_batch: Callable[[int], Any]) -> None:
        self.arm, self.make_batch = arm, make_batch
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.finished, self.count = False, 0
        self.error: BaseException | None = None
        self.spent: dict[threading.Thread, float] = {}
        self.thread = threading.Thread(target=self.live, daemon=True)

    def live(self) -> None:
        try:
            self.arm.run(iter(self))
        except BaseException as error:
            self.error = error
            self.done.release()

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.go.acquire()
            if self.finished:
                return
            self.count += 1
            yield self.make_batch(self.count)
            self.done.release()

    def step(self) -> None:
        """Let the arm take one step; the threads that it starts are its own from then on."""
        before = set(threading.enumerate())
        if self.thread not in before:
            self.thread.start()
        self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error
        self.spent.update(dict.fromkeys((set(threading.enumerate()) - before) - set(self.spent), 0.0))

    def cpu(self) -> float:
        """CPU seconds of all of the arm's threads so far; an ended thread keeps what it was last seen with."""
        for thread in self.spent:
            if thread.is_alive() and thread.ident is not None:
                self.spent[thread] = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        return sum(self.spent.values())


def race(arms: list[Arm], make_batch: Callable[[int], Any], *, rounds: int, warmup: int) -> None:
    """Fill every arm's `seconds` and `share`, one entry per round; the first arm is the baseline."""
    turns = [_Turns(arm, make_batch) for arm in arms]
    for arm, turn in zip(arms, turns, strict=True):
        for _ in range(min(warmup, max(arm.steps, 3))):
            turn.step()
    ticks = max(arm.steps for arm in arms)
    for _ in range(rounds):
        begun = [turn.cpu() for turn in turns]
        beside = [0.0] * len(arms)
        for tick in range(ticks):
            order = range(len(arms)) if tick % 2 == 0 else range(len(arms) - 1, -1, -1)
            due = [i for i in order if (tick + 1) * arms[i].steps // ticks > tick * arms[i].steps // ticks]
            before = turns[0].cpu()
            for i in due:
                turns[i].step()
            bare = turns[0].cpu() - before
            for i in due:
                beside[i] += bare
        for i, arm in enumerate(arms):
            spent = turns[i].cpu() - begun[i]
            arm.seconds.append(spent / arm.steps)
            arm.share.append(spent / beside[i])
        print(f"round {len(arms[0].seconds)}/{rounds}: " + _shown(arms), flush=True)
    for turn in turns:
        turn.finished = True
        turn.go.release()
        turn.thread.join(timeout=120)


def _shown(arms: list[Arm]) -> str:
    return "  ".join(f"{a.name} {a.seconds[-1] * 1e3:.1f} ms ({a.share[-1]:.3f})" for a in arms)


def table(arms: list[Arm]) -> list[tuple[str, float, float, float, float]]:
    """Return name, median ratio to the baseline's same turns, its quartiles, and median milliseconds per step."""
    rows = []
    for arm in arms:
        low, high = min(arm.share), max(arm.share)
        if len(arm.share) > 3:
            low, _, high = statistics.quantiles(arm.share, n=4)
        rows.append((arm.name, statistics.median(arm.share), low, high, statistics.median(arm.seconds) * 1e3))
    return rows
