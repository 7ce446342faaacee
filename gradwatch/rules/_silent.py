"""Faults that show in no loss: gradients that do not come out twice, data that come again and again."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..records import StepRecord
from ._findings import Findings
from ._rule import Rule, State

__all__ = ["RecomputationDiffers", "RepeatedOrder", "SameBatchesOnRanks"]

_FACTOR, _BITS = 6364136223846793005, (1 << 48) - 1


class RecomputationDiffers(Rule):
    """Flags gradients that do not come out again when the same batch is run again, where they always have before.

    Measured with `recompute_every`: bit for bit where the device gives the same bits each time, else beyond the noise
    of several runs. A computation that does not repeat itself in some parameter is not judged there.

    Source: Megatron-LM's rerun state machine; Dixit et al., "Silent data corruptions at scale", arXiv 2102.11245.
    """

    advice: str = (
        "The same batch, weights and random numbers gave another gradient, and a further run says which one was wrong. "
        "Where it comes again on one rank, that device or its memory is suspect: run its diagnostics (`dcgmi diag`), "
        "look for ECC errors, and train without it. Else something in the model keeps a state of its own between "
        "forward passes (a counter, a cache) that is in no buffer."
    )

    is_core = False
    needs = frozenset({"recompute_differs", "recompute_rank", "recompute_elements"})
    awaits = frozenset({"recompute_differs"})

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        count = record.scalars.get("recompute_differs", math.nan)
        elements = record.columns.get("recompute_elements")
        if math.isnan(count) or elements is None:
            return self.unjudged(record, "it was not run again"), state
        judged = record.measured("recompute_elements")
        rank = record.scalars.get("recompute_rank", 0.0)
        text = f"run again, the same batch gives another gradient: {{value:.0f}} elements differ (rank {rank:.0f})"
        return self.over(record, judged & (elements > 0), judged, elements, 0.0, text), state


class RepeatedOrder(Rule):
    """Notes batches that come in the same order again and again, and batches that are the very ones before.

    Needs `fingerprints=True`. Two whole rounds of the same order must have been seen. A sampler that does not shuffle,
    one that is seeded anew in each epoch and a batch that is drawn once and used twice look so; so do full-batch
    training, data that are all one batch, and somebody who overfits one on purpose: it is a note.

    The round is found by Brent's cycle finding ("An improved Monte Carlo factorization algorithm", BIT 20, 1980), and
    confirmed by a checksum over all its batches in their order: memory is a few numbers, however long it is.

    Args:
        records: that must have come in the known order.
        share: of batches that are the very ones before, which is worth a note.
        seen: batches before that share is told.
    """

    records: int = 8
    share: float = 0.2
    seen: int = 50
    severity: str = "info"
    advice: str = (
        "Shuffle anew in each epoch (`shuffle=True`, `sampler.set_epoch(epoch)`; no seed that is set at each epoch's "
        "beginning), and draw a new batch at each step. Training on one batch, or on all data at once, looks the same "
        "and is no fault."
    )

    is_core = False
    needs = frozenset({"batch_fingerprint"})
    awaits = frozenset({"batch_fingerprint"})
    enough = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("records", self.records >= 2, 2)
        self._require("share", 0 < self.share <= 1, "0 and at most 1", "above")
        self._require("seen", self.seen >= 2, 2)

    def init(self) -> State:
        return {"step": -1, "last": -1, "seen": 0, "repeats": 0, "running": 0, **_search(-1)}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        found = record.scalars.get("batch_fingerprint", math.nan)
        if not math.isfinite(found):
            return self.unjudged(record, "the batch was not looked at"), state
        if state["step"] >= 0 and record.step != state["step"] + 1:
            state = self.init()  # what came between is not known
        mark = int(found)
        is_repeat = mark == state["last"]
        state = _follow(state, mark) | {
            "step": record.step,
            "last": mark,
            "seen": state["seen"] + 1,
            "repeats": state["repeats"] + is_repeat,
            "running": state["running"] + 1 if is_repeat else 0,
        }
        return self._judged(record, state), state

    def _judged(self, record: StepRecord, state: State) -> Findings:
        if state["running"] >= 2 * self.records:
            text = f"each of the last {state['running'] + 1} steps had the very same batch"
            return self.whole(record, True, state["running"], 2 * self.records, text)
        period, rounds = state["period"], state["rounds"]
        if period > 1 and rounds * period >= self.records:
            text = f"the same {{value:.0f}} batches came in the same order {rounds + 1} times"
            return self.whole(record, True, period, self.records, text)
        share = state["repeats"] / state["seen"]
        text = "{value:.0%} of the batches are the very ones before"
        return self.whole(record, state["seen"] >= self.seen and share >= self.share, share, self.share, text)


def _search(mark: int, reach: int = 1) -> dict[str, Any]:
    """Return the memory of one who waits for a batch to come again, for at most so many steps."""
    return {"anchor": mark, "reach": reach, "length": 0, "sum": 0, "period": 0, "rounds": 0, "expected": 0}


def _follow(state: State, mark: int) -> State:
    """Return the memory after one more batch."""
    if state["period"]:
        if state["length"] == state["period"]:
            is_same = state["sum"] == state["expected"]
            start = {"rounds": state["rounds"] + 1, "length": 0, "sum": 0} if is_same else _search(mark)
            state = {**state, **start}
    elif state["anchor"] == mark and state["length"] > 1:
        state = {**state, "period": state["length"], "expected": state["sum"], "length": 0, "sum": 0}
    elif state["anchor"] < 0 or state["length"] >= state["reach"]:
        state = {**state, **_search(mark, 2 * state["reach"])}
    return {**state, "length": state["length"] + 1, "sum": (state["sum"] * _FACTOR + mark) & _BITS}


class SameBatchesOnRanks(Rule):
    """Flags ranks that train on the very same batches, where each should have its own.

    Not judged while the batch stays the same from one measurement to the next (all data in one batch), and where ranks
    share batches by right (tensor parallelism, pipelines).

    Args:
        times: measurements running.
    """

    times: int = 3
    advice: str = (
        "Give the loader a `DistributedSampler` (or an iterable dataset that yields each rank's own shard), and seed "
        "what draws the data with the rank: as it is, the other ranks' work is thrown away."
    )

    is_core = False
    needs = frozenset({"ranks_alike", "batch_fingerprint"})
    awaits = frozenset({"ranks_alike"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("times", self.times >= 1, 1)

    def init(self) -> State:
        return {"last": -1.0, "running": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        alike = record.scalars.get("ranks_alike", math.nan)
        mark = record.scalars.get("batch_fingerprint", math.nan)
        if not np.isfinite([alike, mark]).all():
            return self.unjudged(record, "one rank, or batches were not looked at"), state
        if mark == state["last"]:
            return self.unjudged(record, "the batch is the one before"), state
        running = state["running"] + 1 if alike else 0
        text = "{value:.0f} ranks train on the very same batches"
        return self.whole(record, running >= self.times, alike, 0.0, text), {"last": mark, "running": running}
