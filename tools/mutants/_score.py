"""What was found, last time and this time, and what is said of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from ._changes import Mutant

__all__ = ["LEAST", "Results"]

LEAST = 0.85
"""The part of all changes that the tests must notice."""


class Results:
    """The results of the last judgement of each change, and the reasons given for those that survived."""

    def __init__(self, path: Path, reasons: Path) -> None:
        self._path = path
        self._reasons = {
            (entry["file"], entry["function"], entry["change"]): " ".join(entry["reason"].split())
            for entry in yaml.safe_load(reasons.read_text()) or ()
        }

    def _read(self) -> dict[tuple[str, ...], dict[str, object]]:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return {tuple(found["key"]): found for found in map(json.loads, lines)}

    def is_known(self, mutant: Mutant) -> bool:
        """Whether a change has been judged."""
        return mutant.key in self._read()

    def survived(self, mutant: Mutant) -> bool:
        """Whether a change was not killed when it was judged last, or never was."""
        found = self._read().get(mutant.key)
        return found is None or not found["killed"]

    def forget(self, mutants: Sequence[Mutant]) -> None:
        """Drop the results of changes that are about to be judged."""
        again = {m.key for m in mutants}
        kept = [json.dumps(found) for key, found in self._read().items() if key not in again]
        self._path.write_text("".join(line + "\n" for line in kept))

    def tell(self, mutants: Sequence[Mutant]) -> int:
        """Print the table and the survivors; return 0 where all is well."""
        results = self._read()
        judged = [m for m in mutants if m.key in results]
        killed = {m.key for m in judged if results[m.key]["killed"]}
        _table("folder", judged, killed, lambda m: m.file.rpartition("/")[0])
        _table("kind of change", judged, killed, lambda m: m.kind)
        unexplained = 0
        for mutant in judged:
            if mutant.key in killed:
                continue
            reason = self._reasons.get(mutant.key)
            unexplained += reason is None
            print(
                f"{mutant.file}:{mutant.line} {mutant.function}\n    {mutant.change}\n    {results[mutant.key]['why']}"
            )
            print(f"    {reason or 'NO REASON GIVEN'}")
        for key in sorted(self._reasons.keys() - {m.key for m in judged if m.key not in killed}):
            print(f"a reason that nothing needs: {': '.join(key)}")
        score = len(killed) / max(len(judged), 1)
        explained = len(judged) - len(killed) - unexplained
        print(
            f"\n{len(judged)} changes: {len(killed)} killed ({100 * score:.1f} %), {explained} survived with a reason, "
            f"{unexplained} without; {len(mutants) - len(judged)} not judged"
        )
        return int(score < LEAST or unexplained > 0 or len(judged) < len(mutants))


def _table(
    title: str, judged: Sequence[Mutant], killed: set[tuple[str, str, str]], of: Callable[[Mutant], str]
) -> None:
    total, hit = Counter(map(of, judged)), Counter(of(m) for m in judged if m.key in killed)
    print(f"\n{title:28} killed of")
    for name in sorted(total):
        print(f"{name:28} {hit[name]:6} {total[name]:3}")
