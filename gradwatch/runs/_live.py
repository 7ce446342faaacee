"""Which of the recorded records hold, in their order, and which are missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._markup import Prints
from ..records import Bools
from ..sinks.blocks import Block
from ._folder import BlockFile
from ._sound import is_count

__all__ = ["Hole", "Live", "holes", "live_blocks", "starts_of"]


@dataclass(frozen=True, eq=False)
class Live:
    """A block, and which of its records hold."""

    block: Block
    rows: Bools


@dataclass(frozen=True)
class Hole(Prints):
    """Records that a session counted and that are not there.

    Attributes:
        count: how many.
        before, after: the last step on record before them, the first one behind; None where there is none.
        why: what the recorder itself said of them; "" where it knew of nothing.
        said: they were told of as they went missing.
    """

    session: int
    count: int
    before: int | None
    after: int | None
    why: str = ""

    def __str__(self) -> str:
        where = f"after step {self.before:,}" if self.before is not None else "at the beginning"
        if self.why and self.before is not None and self.after is not None:
            return (
                f"recording stopped at {self.before:,}: {self.why}; went on at {self.after:,}; "
                f"{self.count:,} records missing"
            )
        if self.why:
            return f"recording stopped {where}: {self.why}; {self.count:,} records missing"
        until = f" and before step {self.after:,}" if self.after is not None else ""
        return f"{self.count:,} records {where}{until} are missing: files were damaged or removed"


@dataclass
class _Numbers:
    """The numbered records of one session: each one's number and step, and what was told of gaps."""

    numbers: list[NDArray[np.int64]] = field(default_factory=list)
    steps: list[NDArray[np.int64]] = field(default_factory=list)
    gaps: dict[int, str] = field(default_factory=dict)


def starts_of(files: Sequence[BlockFile], sessions: Iterable[int] = ()) -> dict[int, float]:
    """Return, for each session (of the files, and others), the first step that a later one recorded."""
    first: dict[int, float] = {}
    for file in files:
        for block in file.blocks:
            if len(block):
                first[file.session] = min(first.get(file.session, np.inf), float(block.steps.min()))
    asked = {*sessions, *(file.session for file in files)}
    return {s: min((f for later, f in first.items() if later > s), default=np.inf) for s in asked}


def live_blocks(segments: Sequence[BlockFile], journals: Sequence[BlockFile]) -> list[Live]:
    """Return blocks in order, each with the rows that no later session superseded; journals where no block has them."""
    starts = starts_of([*segments, *journals])
    covered = _covered(segments) if any(file.blocks for file in journals) else {}
    found: list[tuple[int, int, int, Live]] = []
    seen: dict[int, _Seen] = {}
    # The newest row of a record in the journals holds: it was written again when it was judged.
    for place, file in enumerate((*segments, *reversed(journals))):
        is_journal = place >= len(segments)
        for block in reversed(file.blocks) if is_journal else file.blocks:
            rows = block.steps < starts.get(file.session, np.inf)
            numbers = block.numbers
            if is_journal and numbers is not None:
                rows &= [number not in covered.get(file.session, ()) for number in numbers.tolist()]
            if numbers is not None:
                rows &= _is_new(numbers, seen.setdefault(file.session, _Seen()))
            if rows.any():
                order = int(numbers[rows].min()) if numbers is not None else -1
                found.append((file.session, order, len(found), Live(block, rows)))
    return [live for *_, live in sorted(found, key=lambda entry: entry[:3])]


@dataclass
class _Seen:
    """Numbers of records met so far; a set only once some came out of their order."""

    parts: list[NDArray[np.int64]] = field(default_factory=list)
    top: int = -1
    known: set[int] | None = None


def _is_new(numbers: NDArray[np.int64], seen: _Seen) -> Bools:
    """Return which records were not met yet, and meet them: bytes that were copied over hold records twice."""
    if not len(numbers):
        return np.ones(0, np.bool_)
    in_order = int(numbers[0]) > seen.top and bool((np.diff(numbers) > 0).all())
    if in_order and seen.known is None:
        seen.parts.append(numbers)
        seen.top = int(numbers[-1])
        return np.ones(len(numbers), np.bool_)
    if seen.known is None:
        seen.known = {number for part in seen.parts for number in part.tolist()}
    new = np.zeros(len(numbers), np.bool_)
    for i, number in enumerate(numbers.tolist()):
        new[i] = number not in seen.known
        seen.known.add(number)
    return new


def _covered(segments: Iterable[BlockFile]) -> dict[int, set[int]]:
    covered: dict[int, set[int]] = {}
    for file in segments:
        for block in file.blocks:
            if block.numbers is not None:
                covered.setdefault(file.session, set()).update(block.numbers.tolist())
    return covered


def holes(
    segments: Sequence[BlockFile], journals: Sequence[BlockFile], sessions: Sequence[dict[str, Any]]
) -> list[Hole]:
    """Return which records are missing, of those that no later session superseded."""
    told = {int(s["number"]): s for s in sessions}
    starts = starts_of([*segments, *journals], told)
    by_session: dict[int, _Numbers] = {}
    for file in (*segments, *journals):
        mine = by_session.setdefault(file.session, _Numbers())
        for block in file.blocks:
            superseded = block.header.get("superseded")
            if isinstance(superseded, list) and len(superseded) == 2 and all(map(is_count, superseded)):
                mine.numbers.append(np.arange(superseded[0], min(superseded[1], superseded[0] + 10**7) + 1))
                mine.steps.append(np.full(len(mine.numbers[-1]), 2**62))
            if block.numbers is None or not len(block):
                continue
            mine.numbers.append(block.numbers)
            mine.steps.append(block.steps)
            gap = block.header.get("gap")
            if isinstance(gap, dict) and isinstance(gap.get("why"), str):
                mine.gaps[int(block.numbers.min())] = gap["why"]
    found: list[Hole] = []
    for number in sorted({*by_session, *told}):
        session = told.get(number, {})
        found += _holes(number, by_session.get(number, _Numbers()), session, starts.get(number, np.inf))
    return found


def _holes(session: int, mine: _Numbers, told: dict[str, Any], start: float) -> list[Hole]:
    numbers = np.concatenate([np.zeros(0, np.int64), *mine.numbers])
    steps = np.concatenate([np.zeros(0, np.int64), *mine.steps])
    numbers, first = np.unique(numbers, return_index=True)
    steps = steps[first]
    total = told.get("records", -1)
    ends = [int(numbers[-1]) + 1] if len(numbers) else [0]
    if is_count(total):
        ends.append(int(total))
    edges = [-1, *numbers.tolist(), max(ends)]
    found = []
    for i in np.flatnonzero(np.diff(np.array(edges, np.int64)) > 1).tolist():
        after = int(steps[i]) if i < len(steps) else None
        if i and int(steps[i - 1]) >= start - 1:
            continue  # a later session has them
        why = mine.gaps.get(int(numbers[i]), "") if i < len(numbers) else str(told.get("failed") or "")
        before = int(steps[i - 1]) if i else None
        found.append(Hole(session, edges[i + 1] - edges[i] - 1, before, after, why))
    return found
