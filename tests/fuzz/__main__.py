"""`python -m tests.fuzz [KIND ...] [--number N] [--seed S]`: damage files, and say what readers made of them."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from .kind import all_kinds
from .run import fuzz, shares


def main(arguments: list[str] | None = None) -> int:
    kinds = {kind.name: kind for kind in all_kinds()}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(kinds)}; all without")
    parser.add_argument("--number", type=int, default=2000, help="corruptions in all")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    chosen = [kinds[name] for name in asked.kinds] or list(kinds.values())
    began, faults = perf_counter(), 0
    for kind in chosen:
        with tempfile.TemporaryDirectory() as work:
            outcome = fuzz(kind, Path(work), number=shares(chosen, asked.number)[kind.name], seed=asked.seed)
        print(outcome, flush=True)
        for fault in (*outcome.tracebacks, *outcome.silent)[:5]:
            print(fault)
        faults += len(outcome.tracebacks) + len(outcome.silent)
    print(f"{faults} faults in {perf_counter() - began:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
