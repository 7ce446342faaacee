"""Branches that are alike, of which only some are used."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..records import Bools, Index, StepRecord
from ._block import Block, Passed
from ._findings import Findings
from ._rule import Rule, State
from ._selection import select

__all__ = ["IdleExperts"]

_NAMED = re.compile(r"expert|moe|mixture", re.IGNORECASE)
_MEMBER = re.compile(r"(?:^|(?<=\.))(\d+)\.")


class IdleExperts(Rule):
    """Flags experts of which most get no gradient any more: the router has collapsed.

    Branches of one list that is named so (`experts`, `moe`), with parameters of the same names and shapes, at least
    three of them: heads that wait for their task's turn are none. One is idle when none of its trainable parameters had
    a gradient for `steps` steps.

    Args:
        share: of the experts that may be idle.
        steps: without a gradient.
    """

    share: float = 0.5
    steps: int = 100
    advice: str = (
        "The router sends (nearly) everything to the same experts, and the others learn nothing. Add or raise the "
        "balancing loss, start the router small and without a favourite, add noise to it, or bound each expert's share."
    )

    is_core = False
    needs = frozenset({"grad_norm"})
    low_is_worse = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("share", 0 < self.share <= 1, "0 and at most 1", "above")
        self._require("steps", self.steps >= 1, 1)

    def init(self) -> State:
        return {"per_path": {}, "seen": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if "grad_norm" not in record.columns or not rows_of_branches(record.index):
            return self.unjudged(record, "there are no like branches, or no gradient was measured"), state
        used = record.measured("grad_norm") & (record.columns["grad_norm"] > 0)
        state = self._after(record.index, state, used[None])
        if state["seen"] <= self.steps:
            return self.unjudged(record, f"fewer than {self.steps} steps"), state
        idle = state["seen"] - state["per_path"]["last"] >= self.steps
        fires, limit = np.zeros(len(record.index), np.bool_), self.share
        counts = [0, 0]
        for branches in rows_of_branches(record.index).values():
            quiet = [b for b in branches if idle[b].all()]
            if self.share * len(branches) < len(quiet) < len(branches):
                fires[np.concatenate(quiet)] = True
                counts = [counts[0] + len(quiet), counts[1] + len(branches)]
        fires &= select(record.index, self.paths)
        text = f"{counts[0]} of {counts[1]} experts get no gradient for {self.steps} steps"
        judged = record.index.is_parameter
        return self.over(record, fires, judged, np.zeros(len(record.index)), limit, text), state

    def _after(self, index: Index, state: State, used: Bools) -> State:
        """Return the memory after steps at which these parameters had a gradient: (steps, paths)."""
        seen = state["seen"]
        last = state["per_path"].get("last")
        last = np.zeros(len(index)) if last is None else last
        steps = np.arange(seen + 1, seen + 1 + len(used), dtype=np.float64)[:, None]
        return {"per_path": {"last": np.maximum(last, (used * steps).max(axis=0))}, "seen": seen + len(used)}

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if not rows_of_branches(block.index):
            return Passed(state, 0, "there are no like branches, or no gradient was measured")
        if block.grad_norms is None:
            return None
        norms, measured = block.grad_norms
        after = self._after(block.index, state, measured & (norms > 0))
        early = min(max(self.steps - state["seen"], 0), len(block))
        members = np.concatenate([b for branches in rows_of_branches(block.index).values() for b in branches])
        if early < len(block) and (after["seen"] - after["per_path"]["last"][members] >= self.steps - len(block)).any():
            return None
        return Passed(after, len(block) - early, f"fewer than {self.steps} steps" * (early > 0))


_CACHE: WeakKeyDictionary[Index, Mapping[str, list[NDArray[np.int64]]]] = WeakKeyDictionary()


def rows_of_branches(index: Index) -> Mapping[str, list[NDArray[np.int64]]]:
    """Return, by the path of the list that holds them, the places of each expert's trainable parameters; rows of three
    like ones or more."""
    if index not in _CACHE:
        _CACHE[index] = _rows(index)
    return _CACHE[index]


def _rows(index: Index) -> Mapping[str, list[NDArray[np.int64]]]:
    held: dict[str, dict[int, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    for place in np.flatnonzero(index.is_parameter & index.trainable & index.in_optimizer).tolist():
        path = index.paths[place]
        for found in _MEMBER.finditer(path):
            if not _NAMED.search(path[: found.start()]):
                continue
            held[path[: found.start()]][int(found[1])][path[found.end() :]] = place
    rows = {}
    for parent, branches in held.items():
        kinds = {tuple((rest, index.shapes[i]) for rest, i in places.items()) for places in branches.values()}
        if len(branches) >= 3 and len(kinds) == 1:
            rows[parent] = [np.array(list(places.values())) for places in branches.values()]
    return rows
