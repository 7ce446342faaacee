"""Train faulty programs, their fixed twins and healthy ones under a watch, and count what its rules say.

```
python benchmarks/faults.py                  all programs, seeds 0 and 1
python benchmarks/faults.py --quick          every fourth program, seed 0
python benchmarks/faults.py --only so3 ctl_  those whose names begin so
python benchmarks/faults.py --preflight      the checks before step 0 instead
```

A fault manifests when the final validation metric is worse than the fixed twin's by more than max(.05, 10 %), or when a
loss or output is not finite. TPR is the share of those runs with an incident of severity warning or above, FPR that of
the fixed twins' runs, balanced accuracy (TPR + 1 - FPR) / 2; diagnosed is the share of the detected runs whose
incidents name the fault, by the table in `fault_programs`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from fault_programs import PEERS as OTHERS
from fault_programs import PROGRAMS, Program, Run, Score, check_all, manifests, run, score

from gradwatch import Watch

Key = tuple[str, int, bool]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    seeds = options.seeds[:1] if options.quick else options.seeds
    programs = chosen(options.only, quick=options.quick)
    begun = time.perf_counter()
    if options.preflight:
        return report_preflight(programs, seeds)
    runs = train_all(programs, seeds, options.rules, options.jobs)
    result = score(programs, runs)
    if options.json:
        as_json(options.json, result, runs)
    show_programs(programs, seeds, runs)
    show(result, time.perf_counter() - begun)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Count what the rules say of faulty and of healthy training programs.")
    parser.add_argument("--quick", action="store_true", help="every fourth program, first seed")
    parser.add_argument("--only", nargs="+", default=(), metavar="PREFIX", help="programs whose names begin so")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rules", default="default", help="preset or rules file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; all cores unless given")
    parser.add_argument("--json", type=Path, help="write all runs and rates to this file")
    parser.add_argument("--preflight", action="store_true", help="check before step 0 instead of training")
    return parser.parse_args(arguments)


def chosen(prefixes: Sequence[str], *, quick: bool) -> list[Program]:
    programs = [p for p in PROGRAMS.values() if not prefixes or p.name.startswith(tuple(prefixes))]
    if not programs:
        sys.exit(f"no program begins with {' or '.join(prefixes)}. Known: {', '.join(PROGRAMS)}")
    return programs[::4] if quick else programs


def train_all(programs: Sequence[Program], seeds: Sequence[int], rules: str, jobs: int) -> dict[Key, Run]:
    """Train every twin once; programs that share a fixed twin share its run."""
    keys = [(p.name, s, f) for p in programs for s in seeds for f in ((False,) if p.is_control else (True, False))]
    different = list({twin_of(key): key for key in reversed(keys)}.values())
    if jobs > 1:
        # Spawned: a forked child of a process that ran torch may hang in its thread pool.
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            done = list(pool.map(partial(train_one, rules), different))
    else:
        done = [train_one(rules, key) for key in different]
    runs = dict(zip(map(twin_of, different), done, strict=True))
    return {key: runs[twin_of(key)] for key in keys}


def twin_of(key: Key) -> object:
    name, seed, faulty = key
    maker = PROGRAMS[name].faulty if faulty else PROGRAMS[name].fixed
    if isinstance(maker, partial):
        return maker.func, maker.args, tuple(sorted(maker.keywords.items())), seed, faulty
    return maker, seed, faulty


def train_one(rules: str, key: Key) -> Run:
    torch.set_num_threads(1)
    logging.getLogger("gradwatch").setLevel(logging.ERROR)
    name, seed, faulty = key
    return run(PROGRAMS[name], seed, faulty=faulty, make_watch=partial(Watch, rules=rules))


def show_programs(programs: Sequence[Program], seeds: Sequence[int], runs: dict[Key, Run]) -> None:
    for program in programs:
        for seed in seeds:
            healthy = runs[program.name, seed, False]
            if program.is_control:
                print(f"{program.name:36} {seed} healthy {'ALARM ' + said(healthy) if healthy.alarms else 'quiet'}")
                continue
            faulty = runs[program.name, seed, True]
            verdict = "found" if faulty.alarms else "MISSED" if manifests(faulty, healthy) else "no harm"
            alarm = f"  FALSE ALARM {said(healthy)}" if healthy.alarms else ""
            metrics = f"{faulty.metric:6.3f} /{healthy.metric:6.3f}"
            print(f"{program.name:36} {seed} {metrics} {verdict:8} {said(faulty)}{alarm}")


def said(one: Run) -> str:
    return " ".join(f"{rule}@{step}" for rule, step in sorted(one.alarms.items(), key=lambda item: item[1]))


def show(result: Score, seconds: float) -> None:
    print("\nrule                     hits  false alarms")
    for rule in sorted({*result.hits, *result.false_alarms}, key=lambda r: -result.hits.get(r, 0)):
        print(f"{rule:24} {result.hits.get(rule, 0):4}  {result.false_alarms.get(rule, 0):4}")
    print("\nrule set                                      TPR   FPR    BA")
    for line in table(result):
        print(line)
    print(
        f"\n{result.num_manifest} manifest runs; diagnosed {result.diagnosed:.2f} of the detected; "
        f"alarms on {result.control_alarms} of {result.num_controls} healthy controls; {seconds:.0f} s"
    )


def table(result: Score) -> Iterator[str]:
    yield f"{'gradwatch, default':42} {result.tpr:6.3f} {result.fpr:5.3f} {result.balanced_accuracy:5.3f}"
    for name, tpr, fpr in OTHERS:
        yield f"{name:42} {tpr:6.2f} {fpr:5.2f}  {(tpr + 1 - fpr) / 2:5.3f}"


def as_json(path: Path, result: Score, runs: dict[Key, Run]) -> None:
    rates = {"tpr": result.tpr, "fpr": result.fpr, "ba": result.balanced_accuracy, "diagnosed": result.diagnosed}
    rates["control_alarms"] = result.control_alarms
    each = [
        asdict(one) | {"program": name, "seed": seed, "faulty": faulty} for (name, seed, faulty), one in runs.items()
    ]
    path.write_text(json.dumps({"rates": rates, "runs": each}, indent=1))


def report_preflight(programs: Sequence[Program], seeds: Sequence[int]) -> int:
    checked = check_all(programs, seeds)
    for one in checked:
        if one.faulty or one.found:
            kind = "faulty" if one.faulty else "FALSE ALARM"
            print(f"{one.program.name:36} {one.seed} {kind:12} {' '.join(one.found) or '-'}")
    faulty, sound = [c for c in checked if c.faulty], [c for c in checked if not c.faulty]
    built = [c for c in faulty if c.is_by_construction]
    print(f"\nfaulty programs with a finding: {sum(bool(c.found) for c in faulty)} of {len(faulty)} runs")
    print(f"of those faulty by construction: {sum(bool(c.found) for c in built)} of {len(built)} runs")
    print(f"fixed and healthy with a finding: {sum(bool(c.found) for c in sound)} of {len(sound)} runs")
    print(f"{sum(c.seconds for c in checked):.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
