"""`python -m tools.mutants`: breaks the package, runs the tests that matter, prints the score.

Fails where fewer than 85 of 100 changes are noticed, or where one that is not has no reason in `survivors.yaml`.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ._changes import Mutant
from ._judging import Job
from ._page import read
from ._pick import FAR, WATCHED, pick
from ._score import Results

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "mutants"
PAGE = ROOT / "benchmarks" / "MUTANTS.md"
COMMAND = "python -m tools.mutants --write"
SUITES = [
    f"tests/{name}"
    for name in (
        *("watch", "treatments", "stats", "rules", "silent", "ahead", "attention", "precision", "samples", "torchside"),
        *("late", "surgery", "sinks", "modes", "callbacks", "trials"),
    )
]
"""Where the tests that matter lie: the others look at doors, pages and programs."""

WHICH = {
    "survivors": "judge those that survived last time once more",
    "resume": "judge those alone that no run has judged yet",
    "tell": "judge none: print what the last runs found",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__)
    parser.add_argument("--count", type=int, default=150, help="changes drawn at random, besides the named ones")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="FILE[:LINE]", help="globs: judge these alone")
    parser.add_argument("--named", action="store_true", help="judge the named changes alone")
    for which, text in WHICH.items():
        parser.add_argument(f"--{which}", dest="which", action="store_const", const=which, default="", help=text)
    parser.add_argument("--fresh", action="store_true", help="draw the map of tests anew")
    parser.add_argument("--suites", nargs="+", default=SUITES, metavar="FOLDER", help="where the tests lie")
    parser.add_argument("--cases", type=int, default=20, help="of a test with more cases than this, run so many")
    parser.add_argument("--near", action="store_true", help="leave out the slow tests of processes of their own")
    parser.add_argument("--jobs", type=int, default=1, help="processes that judge at once, each in a copy of its own")
    parser.add_argument("--seconds", type=float, default=10.0, help="processor time that one change may survive")
    parser.add_argument("--write", action="store_true", help=f"keep what was found in {PAGE.relative_to(ROOT)}")
    parser.add_argument("--list", action="store_true", help="list the changes and judge none")
    options = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    results = Results(KEPT / "results.jsonl", Path(__file__).with_name("survivors.yaml"), read(PAGE, ROOT))
    everything = pick(ROOT, options.count)
    mutants = [m for m in everything if m.kind == "named" or not options.named]
    mutants = [m for m in mutants if any(is_at(m, glob) for glob in options.only)]
    chosen = results.with_tests(todo(mutants, results, options.which))
    if options.list:
        print(*(f"{m.file}:{m.line} {m.function}\n    {m.change}" for m in chosen), sep="\n")
        return 0
    if options.fresh:
        (KEPT / "map").unlink(missing_ok=True)
    if chosen:
        results.forget(chosen)
        far = {} if options.near else FAR
        parts = [chosen] if options.jobs == 1 else [[], *(chosen[i :: options.jobs] for i in range(options.jobs))]
        judge = partial(_judge, suites=options.suites, seconds=options.seconds, far=far, cases=options.cases)
        judge(parts[0])  # where there are several, it draws the map for them
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(judge, parts[1:]))
    if options.write:
        PAGE.write_text(results.page(everything, COMMAND))
    return results.tell(mutants)


def is_at(mutant: Mutant, glob: str) -> bool:
    """Return whether a change lies where a glob says: in a file, or in one line of it."""
    return any(fnmatch.fnmatch(at, glob) for at in (mutant.file, f"{mutant.file}:{mutant.line}"))


def todo(mutants: list[Mutant], results: Results, which: str) -> list[Mutant]:
    """Return those that are to be judged: all, or what `--resume`, `--survivors` or `--tell` leave of them."""
    if which == "tell":
        return []
    if which == "resume":
        return [m for m in mutants if not results.is_known(m)]
    if which == "survivors":  # those that nobody has judged yet come first
        return sorted(filter(results.survived, mutants), key=results.is_known)
    return mutants


def _judge(mutants: list[Mutant], suites: list[str], **options: Any) -> None:
    """Judge changes in a copy of the working tree: the checkout is never broken."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder).resolve() / "copy"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
        job = Path(folder, "job")
        todo = Job(mutants, copy, WATCHED, suites, KEPT / "map", KEPT / "results.jsonl", **options)
        job.write_bytes(pickle.dumps(todo))
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "-m", "tools.mutants._judging", str(job)], cwd=copy, env=environment, check=False
        )


if __name__ == "__main__":
    raise SystemExit(main())
