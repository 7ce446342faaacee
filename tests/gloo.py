"""Starts the ranks of a test as processes of their own.

They end without taking their interpreter down. A worker thread of gloo may still hold the tensor of the last
collective when Python goes; where a process group outlives `destroy_process_group` (a device mesh holds one) nobody
waits for that thread, and on a busy machine it then asks a dying interpreter for its lock and torch aborts the whole
process: 5 of 60 programs that know nothing of gradwatch, on two cores under load.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def spawn(work: Callable[..., None], args: tuple[Any, ...], ranks: int = 2) -> None:
    """Run `work(rank, *args)` in so many processes; an error in one of them is raised here."""
    mp.spawn(_one, (work, args), nprocs=ranks)


def leave() -> None:
    """End this process, all of its work done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _one(rank: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    work(rank, *args)
    leave()
