"""Run the programs of `tests/street`, bare and watched, and say what watching did to them: it should be nothing.

```
python -m benchmarks.street                              all programs, some minutes
python -m benchmarks.street --only gpt vae               these
python -m benchmarks.street --write docs/street.md       the page of the documentation, too
```

Every program runs four times, in processes of their own: bare; watched with the defaults; with everything measured at
every step; and with the preset `autoclip`. The laws are those of the tests. These programs are healthy: an incident of
severity warning or above, seen with the defaults, is a false alarm.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/street.py` finds the programs, too

from tests.street.laws import LAWS  # noqa: E402
from tests.street.street import ARMS  # noqa: E402
from tests.street.table import STREET  # noqa: E402

WATCHED = [arm for arm in ARMS if arm != "bare"]
PAGE = """# The street

Small training programs such as people write, {num} of them, each run bare and watched three times: with the defaults,
with everything measured at every step, and with the preset `autoclip`; every run in a process of its own. They lie in
`tests/street/`, and `make test-slow` runs them all.

This page is made by `python -m benchmarks.street --write docs/street.md`. {took}

- **neutral**: weights, buffers, gradients, optimizer state, random state and losses end the same in all three, bit for
  bit. Where `autoclip` acted it changed training, as it should; all the rest still holds.
- **kept**: tensors alive at the end beyond those of the bare run. **hooks**: left on modules, parameters, optimizers.
- **saved**: as many tensors are saved for backward, in the same order.
- **added**: CPU time of a step beyond the bare one's, with the defaults, in milliseconds. It hardly depends on the size
  of a model, and these are tiny: the README tells what it comes to where steps are long.
- **incidents**: what the default rules said. The programs are healthy: what is a warning or worse is a false alarm.

{table}

{totals}
"""


TOOK = "Each program took as many steps as rules need to judge it."
TOOK_FEW = (
    "It was made with `--short`: each program took as few steps as in the tests, which leaves rules little to judge."
)


@dataclass
class Row:
    """One program, its arms compared."""

    name: str
    outcomes: dict[str, dict[str, Any]]

    @property
    def crashes(self) -> list[str]:
        return [arm for arm, outcome in self.outcomes.items() if "error" in outcome]

    def broken(self, *laws: str) -> dict[str, str]:
        """What each watched arm broke of these laws."""
        bare = self.outcomes["bare"]
        if self.crashes:
            return {}
        said = {
            arm: "; ".join(filter(None, (LAWS[law](bare, self.outcomes[arm]) for law in laws or LAWS)))
            for arm in WATCHED
        }
        return {arm: what for arm, what in said.items() if what}

    @property
    def kept(self) -> int:
        alive = [o["alive"] for o in self.outcomes.values()]
        if self.outcomes["bare"]["traced"]:
            return max(a["bytes"] for a in alive) - alive[0]["bytes"]
        return max(a["tensors"] + a["saved"] for a in alive) - alive[0]["tensors"] - alive[0]["saved"]

    @property
    def hooks(self) -> int:
        return max(sum(o["hooks"].values()) for o in self.outcomes.values()) - sum(
            self.outcomes["bare"]["hooks"].values()
        )

    @property
    def added(self) -> float:
        return self.outcomes["default"]["ms"] - self.outcomes["bare"]["ms"]

    @property
    def incidents(self) -> list[dict[str, Any]]:
        return [] if self.crashes else self.outcomes["default"]["incidents"]

    @property
    def alarms(self) -> int:
        return sum(i["severity"] != "info" for i in self.incidents)

    @property
    def steps(self) -> int:
        return self.outcomes["default"].get("steps", 0)

    def neutral(self) -> str:
        if self.broken("ends_the_same"):
            return "**no**"
        return "yes; autoclip acted" if self.outcomes["autoclip"]["acted"] else "yes"

    def cells(self) -> list[str]:
        if self.crashes:
            return [self.name, f"**crashed**: {', '.join(self.crashes)}", *[""] * 6]
        saved = "**other**" if self.broken("saves_the_same") else "same"
        bare = self.outcomes["bare"]["ms"]
        return [
            self.name,
            str(self.steps),
            self.neutral(),
            str(self.kept),
            str(self.hooks),
            saved if self.outcomes["bare"]["saved"]["count"] else "not counted",
            f"{self.added:.1f} on {bare:.1f}",
            named(self.incidents),
        ]


def named(incidents: Sequence[dict[str, Any]]) -> str:
    """Names of rules with their number, the gravest first."""
    parts = []
    for severity in ("critical", "warning", "info"):
        rules = Counter(i["rule"] for i in incidents if i["severity"] == severity)
        if rules:
            parts.append(f"{severity}: " + ", ".join(f"{r} x {n}" if n > 1 else r for r, n in rules.items()))
    return "; ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    rows = []
    for row in run(options.only or list(STREET), options):
        rows.append(row)
        print(" | ".join(row.cells()), flush=True)
        for arm, what in row.broken().items():
            print(f"    {arm}: {what}", flush=True)
        for arm in row.crashes:
            print(f"    {arm}: {row.outcomes[arm]['error']}", flush=True)
    print("\n" + totals(rows))
    if options.write:
        options.write.write_text(page(rows, TOOK_FEW if options.short else TOOK), encoding="utf-8")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.street", description="Watch the programs of the street."
    )
    parser.add_argument("--only", nargs="+", choices=list(STREET), metavar="NAME", help="these programs")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="arms side by side; all cores unless given"
    )
    parser.add_argument("--short", action="store_true", help="as few steps as the tests take")
    parser.add_argument("--write", type=Path, help="write the page to this file")
    return parser.parse_args(arguments)


def run(names: Sequence[str], options: argparse.Namespace) -> Iterator[Row]:
    """One process for each file of programs: what their libraries load is loaded for no other."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    long = [] if options.short else ["--long"]
    for file in dict.fromkeys(STREET[name] for name in names):
        mine = [name for name in names if STREET[name] == file]
        command = [sys.executable, "-m", "tests.street.run", *mine, *long, "--jobs", str(options.jobs)]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            outcomes: dict[str, dict[str, Any]] = {}
            for line in process.stdout or ():
                outcome = json.loads(line)
                outcomes[outcome["arm"]] = outcome
                if len(outcomes) == len(ARMS):
                    yield Row(outcome["name"], outcomes)
                    outcomes = {}
        if process.returncode:
            sys.exit(f"the programs of {file} did not run: exit {process.returncode}")


def table(rows: Sequence[Row]) -> str:
    head = ["program", "steps", "neutral", "kept", "hooks", "saved", "added", "incidents"]
    lines = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(rows: Sequence[Row], took: str) -> str:
    return PAGE.format(num=len(rows), took=took, table=table(rows), totals=totals(rows))


def totals(rows: Sequence[Row]) -> str:
    whole = [row for row in rows if not row.crashes]
    alarms, steps = sum(row.alarms for row in whole), sum(row.steps for row in whole)
    counts = {
        "programs": len(rows),
        "crashes": len(rows) - len(whole),
        "neutrality breaks": sum(bool(row.broken("ends_the_same")) for row in whole),
        "tensors kept": sum(max(0, row.kept) for row in whole),
        "hooks left": sum(max(0, row.hooks) for row in whole),
        "other saved tensors": sum(bool(row.broken("saves_the_same")) for row in whole),
        "warnings of the watch's own": sum(bool(row.broken("warns_of_nothing")) for row in whole),
    }
    lines = [f"- {name}: {count}" for name, count in counts.items()]
    lines.append(
        f"- false alarms (warning or above): {alarms} in {len(whole)} programs "
        f"({alarms / max(1, len(whole)):.2f} a program), {1000 * alarms / max(1, steps):.2f} in 1,000 steps"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
