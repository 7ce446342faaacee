"""What no other tool shows, measured: one table, a module for each part.

python benchmarks/beyond.py                   # all parts
python benchmarks/beyond.py --only samples noise
"""

from __future__ import annotations

import argparse
from importlib import import_module

PARTS = {
    "samples": "_beyond_samples",
    "noise": "_beyond_noise",
    "what_if": "_beyond_what_if",
    "silent": "_beyond_silent",
    "attention": "_beyond_attention",
    "precision": "_beyond_precision",
    "ahead": "_beyond_ahead",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    print("| what | found | asked for |\n| --- | --- | --- |", flush=True)
    for part in parser.parse_args().only:
        for what, found, asked in import_module(PARTS[part]).rows():
            print(f"| {what} | {found} | {asked} |", flush=True)


if __name__ == "__main__":
    main()
