"""What was found, last time and this time, and what is said of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ._changes import Mutant
from ._page import written

__all__ = ["LEAST", "Results"]

Key = tuple[str, str, str]

LEAST = 0.85
"""The part of all changes that the tests must notice."""


class Results:
    """The results of the last judgement of each change, and the reasons given for those that survived.

    Args:
        path: where a run puts them, a line each.
        reasons: file of the reasons.
        page: results that lie with the code, by key: what a run has found goes before them.
    """

    def __init__(self, path: Path, reasons: Path, page: Mapping[Key, dict[str, Any]] | None = None) -> None:
        self._path, self._page = path, dict(page or {})
        self._reasons = {
            (entry["file"], entry["function"], entry["change"]): " ".join(entry["reason"].split())
            for entry in yaml.safe_load(reasons.read_text()) or ()
        }

    def _own(self) -> dict[Key, dict[str, Any]]:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return {tuple(found["key"]): found for found in map(json.loads, lines)}

    def _read(self) -> dict[Key, dict[str, Any]]:
        return self._page | self._own()

    def is_known(self, mutant: Mutant) -> bool:
        """Whether a change has been judged."""
        return mutant.key in self._read()

    def survived(self, mutant: Mutant) -> bool:
        """Whether a change was not killed when it was judged last, or never was."""
        found = self._read().get(mutant.key)
        return found is None or not found["killed"]

    def with_tests(self, mutants: Sequence[Mutant]) -> list[Mutant]:
        """Return changes with the test that noticed each of them last time: it is asked first."""
        results = self._read()
        whys = [str(results.get(m.key, {}).get("why", "")) if not self.survived(m) else "" for m in mutants]
        return [replace(m, seen_by=why if "::" in why else "") for m, why in zip(mutants, whys, strict=True)]

    def forget(self, mutants: Sequence[Mutant]) -> None:
        """Drop the results of changes that are about to be judged."""
        again = {m.key for m in mutants}
        kept = [json.dumps(found) for key, found in self._own().items() if key not in again]
        self._page = {key: found for key, found in self._page.items() if key not in again}
        self._path.write_text("".join(line + "\n" for line in kept))

    def page(self, mutants: Sequence[Mutant], command: str) -> str:
        """Return the page that lies with the code, for all changes."""
        results = {key: {**found, "reason": self._reasons.get(key)} for key, found in self._read().items()}
        return written(mutants, results, self._sentence(mutants), command)

    def tell(self, mutants: Sequence[Mutant]) -> int:
        """Print the table and the survivors; return 0 where all is well."""
        results = self._read()
        judged = [m for m in mutants if m.key in results]
        killed = {m.key for m in judged if results[m.key]["killed"]}
        _table("folder", judged, killed, lambda m: m.file.rpartition("/")[0])
        _table("kind of change", judged, killed, lambda m: m.kind)
        survivors = [m for m in judged if m.key not in killed]
        for mutant in survivors:
            print(
                f"{mutant.file}:{mutant.line} {mutant.function}\n    {mutant.change}\n    {results[mutant.key]['why']}"
            )
            print(f"    {self._reasons.get(mutant.key) or 'NO REASON GIVEN'}")
        for key in sorted(self._reasons.keys() - {m.key for m in survivors}):
            print(f"a reason that nothing needs: {': '.join(key)}")
        print(f"\n{self._sentence(mutants)}")
        score = len(killed) / max(len(judged), 1)
        unexplained = any(m.key not in self._reasons for m in survivors)
        return int(score < LEAST or unexplained or len(judged) < len(mutants))

    def _sentence(self, mutants: Sequence[Mutant]) -> str:
        results = self._read()
        judged = [m for m in mutants if m.key in results]
        survivors = [m for m in judged if not results[m.key]["killed"]]
        killed, explained = len(judged) - len(survivors), sum(m.key in self._reasons for m in survivors)
        return (
            f"{len(judged)} changes judged: {killed} killed ({100 * killed / max(len(judged), 1):.1f} %), {explained} "
            f"survived with a reason, {len(survivors) - explained} without; {len(mutants) - len(judged)} not judged."
        )


def _table(
    title: str, judged: Sequence[Mutant], killed: set[tuple[str, str, str]], of: Callable[[Mutant], str]
) -> None:
    total, hit = Counter(map(of, judged)), Counter(of(m) for m in judged if m.key in killed)
    print(f"\n{title:28} killed of")
    for name in sorted(total):
        print(f"{name:28} {hit[name]:6} {total[name]:3}")
