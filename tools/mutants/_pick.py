"""Chooses the changes: those with a name, and a sample of all others that stays the same while the code does."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import yaml

from ._changes import Mutant, functions_of, mutants_of, named_mutant

__all__ = ["FAR", "WATCHED", "pick"]

FOLDERS = ("gradwatch/stats", "gradwatch/watch", "gradwatch/treatments")
WATCHED = (*FOLDERS, "gradwatch/rules")
"""Folders in which changes with a name may lie."""
NOT_RUN_HERE = {
    "gradwatch/stats/_triton.py": "a kernel for CUDA alone; tests/stats/test_cuda.py runs it where there is a device",
}
_RANKS = ("tests/stats/test_sharded.py", "tests/treatments/test_sharded.py", "tests/modes/test_distributed.py")
FAR = {
    "gradwatch/stats/_exchange.py": _RANKS,
    "gradwatch/stats/_library.py": ("tests/stats/test_library.py",),
    "gradwatch/stats/_native.py": ("tests/stats/test_native.py",),
    "gradwatch/stats/_shards.py": _RANKS,
    "gradwatch/stats/_tasks.py": _RANKS,
    "gradwatch/treatments/_units.py": ("tests/treatments/test_sharded.py",),
    "gradwatch/watch/_accord.py": ("tests/late/test_several_ranks.py",),
    "gradwatch/watch/_after_step.py": _RANKS,
    "gradwatch/watch/_local_norms.py": _RANKS,
    "gradwatch/watch/_model_meter.py": ("tests/modes/test_distributed.py",),
    "gradwatch/watch/_parallel.py": _RANKS,
    "gradwatch/watch/_ranks.py": _RANKS,
    "gradwatch/watch/_turn.py": _RANKS,
}
"""Tests of files whose code runs on ranks, or once in a process: they start processes of their own, and are slow."""
SEED = "1"


def pick(root: Path, count: int) -> list[Mutant]:
    """Return the named changes and `count` others: one of each file at least, one of each statement at most.

    Drawn by a checksum of place and text, so that a change elsewhere draws no other sample.
    """
    return [*_named(root), *_sample(root, count)]


def _named(root: Path) -> list[Mutant]:
    entries = yaml.safe_load(Path(__file__).with_name("named.yaml").read_text())
    return [
        replace(_found(root, e["file"], e.get("function", ""), e["old"], e.get("new") or ""), tests=(e["test"],))
        for e in entries
    ]


def _found(root: Path, file: str, function: str, old: str, new: str) -> Mutant:
    """Return a named change; where its function has moved to another file or class, from there."""
    path = root / file
    try:
        return named_mutant(file, path.read_text() if path.exists() else "", function, old, new)
    except LookupError as lost:
        name = function.rpartition(".")[2]
        texts = {p: p.read_text() for folder in WATCHED for p in sorted((root / folder).glob("*.py"))}
        places = [
            (path, text, known)
            for path, text in texts.items()
            for known, body in {"": text, **functions_of(text)}.items()
            if known.rpartition(".")[2] == name and body.count(old) == 1
        ]
        if len(places) != 1:
            raise LookupError(f"{lost} Put in `named.yaml` what stands for it now.") from None
        ((path, text, known),) = places
        return named_mutant(path.relative_to(root).as_posix(), text, known, old, new)


def _sample(root: Path, count: int) -> list[Mutant]:
    firsts: list[Mutant] = []
    others: list[Mutant] = []
    for folder in FOLDERS:
        for path in sorted((root / folder).glob("*.py")):
            file = path.relative_to(root).as_posix()
            if file in NOT_RUN_HERE or path.name == "__init__.py":
                continue
            drawn: list[Mutant] = []
            places: set[tuple[str, int]] = set()
            for mutant in sorted(mutants_of(file, path.read_text()), key=_rank):
                place = mutant.function, mutant.line
                if place not in places:
                    places.add(place)
                    drawn.append(mutant)
            firsts += drawn[:1]
            others += drawn[1:]
    chosen: list[Mutant] = []
    for mutant in (*firsts, *sorted(others, key=_rank)):
        if len(chosen) == count:
            break
        if mutant.compiles:
            chosen.append(mutant)
    return sorted(chosen, key=lambda m: (m.file, m.line, m.change))


def _rank(mutant: Mutant) -> str:
    return hashlib.sha1("\0".join((SEED, *mutant.key)).encode()).hexdigest()
