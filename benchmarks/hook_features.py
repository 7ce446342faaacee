"""Which features and behaviours of other hook systems there are here: each is a small check by real code.

    python benchmarks/hook_features.py [--failing] [--only WORD]

The first table goes by the features that five descriptions of hook systems name, the second by behaviours that the
tests and pages of torch, TransformerLens, mi-crow, nnsight, baukit, pyvene and captum ask for, in words of our own. A
check works, or what is missing is said in its own words.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

GOALS = {"features": 0.96, "behaviours": 0.95}
MODULES = (
    "torch_hooks",
    "mi_crow",
    "five_uses",
    "transformer_lens",
    "manager",
    "peers_torch",
    "peers_lens",
    "peers_tracing",
    "peers_causal",
)


def checks():
    """Return the two tables: each of (source, name, check)."""
    for name in MODULES:
        import_module(f"benchmarks.hook_checks.{name}")
    base = import_module("benchmarks.hook_checks._base")
    return {"features": base.FEATURES, "behaviours": base.BEHAVIOURS}


def outcome(check):
    """Run one check; return "" where it works, else the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check()
    except (Exception, SystemExit) as error:
        place = error.__traceback__
        while place.tb_next is not None and "hook_checks" in place.tb_next.tb_frame.f_code.co_filename:
            place = place.tb_next
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return f"{said[:160]} (line {place.tb_lineno})"
    return ""


def run(only=""):
    """Return {table: [(source, name, reason)]}."""
    return {
        table: [(source, name, outcome(check)) for source, name, check in known if only in f"{source} {name}"]
        for table, known in checks().items()
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--failing", action="store_true", help="only what does not work")
    parser.add_argument("--only", default="", help="checks whose name holds this")
    given = parser.parse_args()
    start = time.time()
    below = []
    for table, found in run(given.only).items():
        for source, name, reason in found:
            if reason or not given.failing:
                print(f"{source:22} | {name:88.88} | {'missing: ' + reason if reason else 'works'}")
        works = sum(not reason for *_, reason in found)
        share = works / max(len(found), 1)
        print(f"== {table}: {works} of {len(found)} work ({share:.1%}; goal {GOALS[table]:.0%})\n")
        if share < GOALS[table]:
            below.append(table)
    print(f"{time.time() - start:.0f} s")
    return 1 if below and not given.only else 0


if __name__ == "__main__":
    sys.exit(main())
