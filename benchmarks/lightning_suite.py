"""Run Lightning's own tests with GradWatch in every Trainer, and name those that fail with it alone.

```
python benchmarks/lightning_suite.py CHECKOUT/tests       all that is named in `SELECTED`
python benchmarks/lightning_suite.py CHECKOUT/tests --select callbacks/test_lambda_function.py
python benchmarks/lightning_suite.py CHECKOUT/tests --everything           a third time, with all hooks at every step
```

pytest runs twice over the same files, in a process of its own each. Both times a callback is put into every Trainer
through Lightning's entry point for callback factories: first an empty `Callback()`, then a `GradWatch` whose own faults
are errors (`on_error="raise"`). Tests that compare the list of callbacks fail both times; what fails with GradWatch
alone is GradWatch's doing. `--everything` runs them once more with every measurement at every step and full backward
hooks. pytest works in the folder `tests_pytorch`, as Lightning's own runs do: a fixture there fails where files are
left behind. Lightning's source distribution holds no tests: this wants a checkout of the installed version, and what
its `requirements/pytorch/test.txt` names.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from _lightning_arm import GROUPS

__all__ = ["Arm", "compare", "run_arm"]

SELECTED = ("trainer", "loops", "callbacks", "core", "models", "plugins/precision", "loggers", "tuner")
BAD = ("failed", "crashed")


@dataclass
class Arm:
    """What came out of one run.

    Attributes:
        outcomes: of each test, by its id: "passed", "failed", "skipped" or "crashed" (the process ended with it).
        errors: the first line of each failed test's error.
        warnings: what gradwatch warned of, and how often.
        num_watched: callbacks that saw a step.
    """

    outcomes: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    warnings: Counter[str] = field(default_factory=Counter)
    num_watched: int = 0
    seconds: float = 0.0


@dataclass
class Comparison:
    """Two arms, test by test: how many, and which ones differ."""

    counts: dict[str, int]
    only_empty: list[str]
    only_gradwatch: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    files = chosen(options.tests, options.select)
    names = ("empty", "gradwatch", *(["everything"] if options.everything else []))
    arms: dict[str, Arm] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            folder = Path(place) / name
            arms[name] = run_arm(name, options.tests, files, folder, k=options.k, timeout=options.timeout)
            print(f"{name}: {len(arms[name].outcomes)} tests in {arms[name].seconds:.0f} s", flush=True)
    if options.json:
        options.json.write_text(json.dumps({name: vars(arm) for name, arm in arms.items()}, indent=1))
    empty = arms.pop("empty")
    if not empty.outcomes:
        print("No test ran: see pytest's own output above.")
        return 2
    results = {name: compare(empty, arm) for name, arm in arms.items()}
    for name, result in results.items():
        show(name, result, arms[name])
    return 1 if any(result.only_gradwatch for result in results.values()) else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=rest.replace("```\n", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tests", type=Path, metavar="TESTS_DIR", help="the checkout's `tests` folder")
    parser.add_argument(
        "--select",
        nargs="+",
        default=SELECTED,
        metavar="PATH",
        help=f"files and folders under tests_pytorch; {' '.join(SELECTED)} unless given",
    )
    parser.add_argument("-k", metavar="EXPRESSION", help="pytest's own: tests whose names match")
    parser.add_argument("--everything", action="store_true", help="once more, measuring all there is at every step")
    parser.add_argument(
        "--timeout", type=float, default=3600, metavar="SECONDS", help="for each run; 3600 unless given"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all outcomes to this file")
    return parser.parse_args(arguments)


def chosen(tests: Path, selected: Sequence[str]) -> list[str]:
    suite = tests / "tests_pytorch"
    if not suite.is_dir():
        sys.exit(f"{tests} holds no folder tests_pytorch: give the `tests` folder of a checkout of Lightning.")
    missing = [path for path in selected if not (suite / path).exists()]
    if missing:
        sys.exit(f"not under {suite}: {', '.join(missing)}")
    return [str((suite / path).resolve()) for path in selected]


def run_arm(
    arm: str, tests: Path, files: Sequence[str], folder: Path, *, k: str | None = None, timeout: float = 3600
) -> Arm:
    """Run pytest over the files with one callback in every Trainer.

    Args:
        arm: `"empty"`, `"gradwatch"` or `"everything"`.
        tests: the folder that holds `tests_pytorch`.
        files: to run.
        folder: for the entry point and outcomes; made here.
        k: pytest's `-k`.
        timeout: seconds after which the run is ended.
    """
    plugin = install(folder / "path")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-p", plugin]
    begun = time.perf_counter()
    with (folder / "pytest.txt").open("w") as output:
        try:
            done = subprocess.run(
                [*command, *(["-k", k] if k else []), *files],
                cwd=tests / "tests_pytorch",
                env=environment(arm, tests, folder),
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            )
            code: int | None = done.returncode
        except subprocess.TimeoutExpired:
            code = None
    result = read(folder)
    result.seconds = time.perf_counter() - begun
    if code not in (0, 1):
        ended = f"was ended after {timeout:.0f} s" if code is None else f"ended with exit code {code}"
        lines = (folder / "pytest.txt").read_text(errors="replace").splitlines()
        print(f"{arm}: pytest {ended}", *lines[-10:], sep="\n")
    return result


def install(path: Path) -> str:
    """Put the plugin and its entry points where Python finds them, and return the module's name."""
    source = Path(__file__).with_name("_lightning_arm.py")
    module = f"gradwatch_suite{source.stem}"
    metadata = path / "gradwatch_suite-0.dist-info"
    metadata.mkdir(parents=True)
    shutil.copy(source, path / f"{module}.py")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gradwatch-suite\nVersion: 0\n")
    lines = [f"[{group}]\nsuite = {module}:{function}\n" for function, group in GROUPS.items()]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    return module


def environment(arm: str, tests: Path, folder: Path) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("GRADWATCH", "GRADWATCH_RULES")}
    path = [str(folder / "path"), str(tests.resolve()), inherited.get("PYTHONPATH", "")]
    return inherited | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "LIGHTNING_SUITE_ARM": arm,
        "LIGHTNING_SUITE_FOLDER": str(folder),
    }


def read(folder: Path) -> Arm:
    """Return the outcomes that the plugin wrote down; a test's worst phase counts."""
    arm = Arm()
    ended = set()
    notes = folder / "outcomes.jsonl"
    for text in notes.read_text().splitlines() if notes.exists() else ():
        line = json.loads(text)
        test, outcome = line["test"], line["outcome"]
        if line["phase"] == "warning":
            arm.warnings[line["error"]] += 1
            continue
        if line["phase"] == "watched":
            arm.num_watched += 1
            continue
        if line["phase"] in ("teardown", "collect"):
            ended.add(test)
        if outcome != "passed" and arm.outcomes.get(test) != "failed":
            arm.outcomes[test] = outcome
            arm.errors[test] = next(iter(line["error"].splitlines()), "")
        arm.outcomes.setdefault(test, "passed")
    for test in arm.outcomes.keys() - ended:
        arm.outcomes[test], arm.errors[test] = "crashed", "the process ended during this test"
    return arm


def compare(empty: Arm, watched: Arm) -> Comparison:
    """Compare the outcomes test by test; a test that ran in one arm only has failed in the other."""
    pairs = {
        test: (empty.outcomes.get(test, "crashed"), watched.outcomes.get(test, "crashed"))
        for test in {**empty.outcomes, **watched.outcomes}
    }
    only_empty = [test for test, (a, b) in pairs.items() if a in BAD and b not in BAD]
    only_gradwatch = [test for test, (a, b) in pairs.items() if b in BAD and a not in BAD]
    counts = {
        "passed in both": sum(pair == ("passed", "passed") for pair in pairs.values()),
        "skipped": sum("skipped" in pair and not set(pair) & set(BAD) for pair in pairs.values()),
        "failed in both": sum(a in BAD and b in BAD for a, b in pairs.values()),
        "failed with the empty callback alone": len(only_empty),
        "failed with gradwatch alone": len(only_gradwatch),
    }
    return Comparison({"tests": len(pairs), **counts}, only_empty, only_gradwatch)


def show(name: str, result: Comparison, watched: Arm) -> None:
    print(f"\n| {name} | |\n|---|---|")
    for outcome, count in result.counts.items():
        print(f"| {outcome} | {count} |")
    print(f"| callbacks that saw a step | {watched.num_watched} |")
    listed(
        "failed with gradwatch alone", [f"{t}  {watched.errors.get(t, 'did not run')}" for t in result.only_gradwatch]
    )
    listed("failed with the empty callback alone", result.only_empty)
    listed("gradwatch warned", [f"{count} x {text}" for text, count in watched.warnings.most_common()])


def listed(title: str, lines: Sequence[str]) -> None:
    if lines:
        print(f"\n{title}:", *lines, sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
