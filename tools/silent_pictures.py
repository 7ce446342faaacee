"""Make the picture of docs/silent_faults.md, from the program on that page.

python tools/silent_pictures.py [--out docs/pictures]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.sample_pictures import BLUE, RED, figure, first_program, plain  # noqa: E402


def silent_faults(out: Path) -> None:
    history = first_program("silent_faults.md")["watch"].history
    again = [r for r in history if "recompute_elements" in r.columns]
    counts = [int(np.nansum(r.columns["recompute_elements"])) for r in again]
    marks = [int(r.scalars["batch_fingerprint"]) for r in history]
    known = {mark: i for i, mark in enumerate(dict.fromkeys(marks))}
    picture = figure(9.0, 2.9)
    left, right = picture.subplots(1, 2)
    left.bar([r.step for r in again], counts, color=RED, width=1.2)
    left.plot([r.step for r in again], [0] * len(again), "o", color=BLUE, markersize=4)
    plain(left, "elements of the gradient that differ when run again", "step", "elements")
    right.plot([r.step for r in history], [known[mark] for mark in marks], ".", color=BLUE)
    plain(right, "which batch: known again by its fingerprint", "step", "batch")
    picture.savefig(out / "silent-faults.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    silent_faults(parser.parse_args().out)


if __name__ == "__main__":
    main()
