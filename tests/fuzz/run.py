"""The fuzzer: sound samples, damaged one way each, read, and what became of it."""

from __future__ import annotations

import shutil
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gradwatch.errors import GradwatchError, GradwatchWarning

from .kind import Kind, Reading


@dataclass
class Outcome:
    """What came of many corruptions of one kind.

    Attributes:
        tracebacks: of readings that ended in anything but words, with what was done before.
        silent: corruptions after which something was missing and nothing was said.
        counts: how the others ended.
    """

    kind: str
    tracebacks: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        total = sum(self.counts.values())
        parts = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))
        return (
            f"{self.kind:14}{total:6} corruptions: {len(self.tracebacks)} tracebacks, "
            f"{len(self.silent)} missing in silence ({parts})"
        )


def read(kind: Kind, folder: Path) -> tuple[Reading, list[str]]:
    """Return what came out of reading, and what was told meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            reading = kind.read(folder)
        except GradwatchError as error:
            reading = Reading(refused=str(error))
    told = [str(w.message) for w in caught if issubclass(w.category, GradwatchWarning)]
    return reading, told


def fuzz(kind: Kind, work: Path, *, number: int, seed: int) -> Outcome:
    """Damage samples of a kind and read them.

    Args:
        kind: of file.
        work: an empty folder.
        number: of corruptions.
        seed: of all that is drawn.
    """
    sound, damaged = work / "sound", work / "damaged"
    sound.mkdir(parents=True)
    kind.make(sound)
    whole, told = read(kind, sound)
    if told or whole.refused or not whole.found:
        raise AssertionError(f"the sound sample of {kind.name!r} is not read in peace: {told} {whole.refused}")
    outcome = Outcome(kind.name)
    for i in range(number):
        rng = np.random.default_rng([seed, i])
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(sound, damaged, symlinks=True)
        said = kind.damage(damaged, rng)
        _count(outcome, kind, damaged, whole, f"{kind.name} seed {seed} number {i}: {said}")
    return outcome


def _count(outcome: Outcome, kind: Kind, damaged: Path, whole: Reading, said: str) -> None:
    try:
        reading, told = read(kind, damaged)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome.tracebacks.append(f"{said}\n{traceback.format_exc(limit=-4)}")
        outcome.counts["tracebacks"] += 1
        return
    if reading.refused:
        outcome.counts["refused in a line"] += 1
        if "\n" in reading.refused:
            outcome.tracebacks.append(f"{said}\nrefused in more than a line: {reading.refused!r}")
    elif whole.found <= reading.found:
        outcome.counts["read whole"] += 1
    elif told:
        outcome.counts["missing and told"] += 1
    else:
        outcome.counts["missing in silence"] += 1
        missing = sorted(map(repr, whole.found - reading.found))[:4]
        outcome.silent.append(f"{said}: missing {', '.join(missing)}")


def shares(kinds: Sequence[Kind], number: int) -> dict[str, int]:
    """Return how many of the corruptions fall to each kind."""
    total = sum(kind.share for kind in kinds)
    return {kind.name: max(1, round(number * kind.share / total)) for kind in kinds}
