"""Run programs of the street, each arm in a process of its own, and print one line of JSON for each.

```
python -m tests.street.run cnn --arm default    one arm
python -m tests.street.run cnn vae              all arms of these programs
python -m tests.street.run --long --jobs 2      all programs, with as many steps as the benchmark takes
```

Each arm is a fork of a process that has imported torch and the libraries that the program uses, and **nothing of
gradwatch**: what an earlier run left warm in a process (a cache, a reference computed once) hides faults of the first
step, and a fork of a process that never saw gradwatch has none of it, without importing torch once more. Each has a
folder of its own, too.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import logging
import os
import random
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # torch.optim imports it at the first use, which would cost each fork its seconds

from . import witness
from .street import ARMS, PROGRAMS, Program, Street
from .table import STREET

SECONDS = 240  # an arm that hangs is ended by a signal


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    tasks = [(load(name), arm) for name in options.names or STREET for arm in options.arm or ARMS]
    gc.freeze()  # what a fork counts is its own
    for outcome in fork_each(tasks, options):
        print(json.dumps(outcome), flush=True)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.street.run", description="Run programs, bare and watched.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="programs; all unless given")
    parser.add_argument("--arm", action="append", choices=list(ARMS), help="all unless given; may be repeated")
    parser.add_argument("--steps", type=int, help="instead of each program's own number")
    parser.add_argument("--long", action="store_true", help="as many steps as the benchmark takes")
    parser.add_argument("--jobs", type=int, default=2, help="arms that run side by side")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in STREET]
    if unknown:
        parser.error(f"no program {' or '.join(unknown)}. Known: {', '.join(STREET)}")
    return options


def load(name: str) -> Program:
    import_module(f"{__package__}.{STREET[name]}")
    return PROGRAMS[name]


def fork_each(tasks: Sequence[tuple[Program, str]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run each task in a fork, some side by side; outcomes come in the order of the tasks."""
    assert not [name for name in sys.modules if name.split(".")[0] == "gradwatch"], "a fork must not inherit gradwatch"
    with tempfile.TemporaryDirectory(prefix="street-") as folder:
        running: dict[int, int] = {}
        done: dict[int, dict[str, Any]] = {}
        told, waiting = 0, list(enumerate(tasks))
        while told < len(tasks):
            while waiting and len(running) < options.jobs:
                number, (program, arm) = waiting.pop(0)
                running[fork(program, arm, Path(folder, str(number)), options)] = number
            pid, status = os.waitpid(-1, 0)
            number = running.pop(pid)
            done[number] = collect(Path(folder, str(number)), *tasks[number], status)
            while told in done:
                yield done.pop(told)
                told += 1


def fork(program: Program, arm: str, folder: Path, options: argparse.Namespace) -> int:
    folder.mkdir()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        with Path("said").open("wb") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        faulthandler.enable()
        signal.alarm(SECONDS)
        outcome = run(program, arm, options.steps or (program.long if options.long else program.steps))
        Path("outcome.json").write_text(json.dumps(outcome))
        code = 0
    except BaseException:  # whatever it is, it must not run on in a second copy of the caller
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def collect(folder: Path, program: Program, arm: str, status: int) -> dict[str, Any]:
    if status == 0:
        return json.loads((folder / "outcome.json").read_text())
    said = (folder / "said").read_text(errors="replace")[-3000:]
    how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
    return {"name": program.name, "arm": arm, "error": f"{how}\n{said}"}


def run(program: Program, arm: str, steps: int) -> dict[str, Any]:
    """Run one arm here, and say what it left."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    street, saved = Street(arm, steps), witness.Saved()
    lines = Lines()
    logging.getLogger().addHandler(lines)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if program.saved:
            street.counting.enter_context(saved.hooks())
        with street.counting:
            kept = list(witness.leaves(program.train(street)))
    outcome = {
        "name": program.name,
        "arm": arm,
        "traced": program.traced,
        "told": program.told,
        "steps": street.num_steps,
        "ms": street.ms_per_step,
        "digests": {"losses": witness.digest(street.losses), **witness.state(kept)},
        "saved": {"count": len(saved.seen), "order": witness.digest(saved.seen)},
        "marks": witness.marks(kept),
        "hooks": witness.hooks_left(kept),
        "warnings": sorted({f"{w.category.__name__}: {_plain(str(w.message))}" for w in warned} | lines.seen),
        "incidents": incidents(street),
        "acted": acted(street),
        "measured": sum(len(watch.history) for watch in street.watches),
    }
    del warned
    held = witness.alive()  # beside what the user holds: watches that are closed
    street.watches.clear()
    return {**outcome, "alive": {**witness.alive(), "saved": saved.num_alive}, "held": held}


def incidents(street: Street) -> list[dict[str, Any]]:
    return [
        {"rule": i.rule, "severity": i.severity, "step": i.first_step, "text": str(i)}
        for watch in street.watches
        for i in watch.incidents
    ]


def acted(street: Street) -> bool:
    """Whether any treatment changed a gradient or a step."""
    return any(i.treatments for w in street.watches for i in w.incidents) or any(
        record.treatments or record.skipped for w in street.watches for record in w.history
    )


class Lines(logging.Handler):
    """What is logged as a warning or worse, incidents left out."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if not line.startswith("gradwatch ["):  # incidents are told of apart
            self.seen.add(f"{record.name}: {_plain(line)}")


def _plain(message: str) -> str:
    """Without the numbers, which may be of the moment (a time, an address)."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", message)[:400]


if __name__ == "__main__":
    sys.exit(main())
