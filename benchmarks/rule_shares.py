"""What each rule rests on, and its share of what the faulty programs' runs showed, from `benchmarks/faults.py --json`.

```
python benchmarks/faults.py --json runs.json
python benchmarks/rule_shares.py runs.json --write docs/rule_shares.md
```
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fault_programs import PROGRAMS, Run, manifests

from gradwatch import load_rules
from gradwatch.records import kinds_in
from gradwatch.rules import Rule

HEAD = """# What each rule rests on, and what it found

Made by `python benchmarks/rule_shares.py` from the runs of `python benchmarks/faults.py --json` ({faulty} runs in which
a fault shows, {healthy} of fixed twins and healthy programs, seed{s} {seeds}; preset `default`).

- **reads**: columns and scalars that it judges by (see [What a record holds](columns.md)).
- **gate**: kinds of training that it treats otherwise, as it reads them on the record.
- **found**: share of the faulty runs in which it spoke as a warning or worse; **first**: and nothing did before it.
- **false**: healthy runs in which it spoke.

| rule | reads | gate | found | first | false |
| --- | --- | --- | --- | --- | --- |
"""


def gate_of(rule: Rule) -> str:
    kinds = [kind.replace("_", " ") for kind in kinds_in(rule.needs)]
    return ", ".join(kinds + ["several optimizers"] * bool({"optimizer", "others_step"} & rule.needs))


def row(rule: Rule, faulty: Sequence[Run], healthy: Sequence[Run]) -> str:
    spoke = [run for run in faulty if rule.name in run.alarms]
    first = [run for run in spoke if run.alarms[rule.name] == min(run.alarms.values())]
    false = sum(rule.name in run.alarms for run in healthy)
    reads = ", ".join(f"`{name}`" for name in sorted(rule.needs) if not name.startswith("kind/"))
    shares = [f"{len(found) / max(len(faulty), 1):.2f}" if found else "" for found in (spoke, first)]
    return f"| `{rule.name}` | {reads} | {gate_of(rule)} | {' | '.join(shares)} | {false or ''} |"


def page(runs: Sequence[dict[str, Any]]) -> str:
    known = {(r["program"], r["seed"], r["faulty"]): Run(**r) for r in runs}
    faulty = [run for key, run in known.items() if key[2] and _shows(run, known)]
    healthy = [run for key, run in known.items() if not key[2]]
    seeds = sorted({run.seed for run in known.values()})
    head = HEAD.format(
        faulty=len(faulty), healthy=len(healthy), seeds=" and ".join(map(str, seeds)), s="s" * (len(seeds) > 1)
    )
    return head + "\n".join(row(rule, faulty, healthy) for rule in load_rules("default")) + "\n"


def _shows(run: Run, known: dict[tuple[str, int, bool], Run]) -> bool:
    twin = known.get((run.program, run.seed, False))
    return run.program in PROGRAMS and twin is not None and manifests(run, twin)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write what each rule rests on, and its share of what was found.")
    parser.add_argument("runs", type=Path, help="what `benchmarks/faults.py --json` wrote")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="instead of printing it")
    options = parser.parse_args(arguments)
    text = page(json.loads(options.runs.read_text())["runs"])
    if options.write:
        options.write.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
