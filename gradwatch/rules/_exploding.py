"""The spike of one step: the gradient norm leaves its own recent level."""

from __future__ import annotations

import math

import numpy as np

from ..records import Floats, StepRecord
from ._block import Block, Passed
from ._findings import Findings
from ._rule import Rule, State
from ._selection import select
from ._windows import Window, level, median, push, stream, stream_over

__all__ = ["Exploding"]


_FAR_BELOW = -10.0
"""A loss that few objectives reach with the right sign."""


class Exploding(Rule):
    """Flags a global norm far above its recent level: z > `z`, or z > `z_again` twice running, and `ratio` times it.

    z is robust and on the log: (log norm - median) / (1.4826 MAD) over the last `window` accepted norms. The present,
    a suspicious or a non-finite norm is never in the window. Both conditions must hold: z sees the noise of the run,
    the ratio the size of the jump; twice running each jump must be sqrt(`ratio`). In a run whose norm is noisy z
    alone would let a thousandfold spike pass, so a norm `ceiling` times the level counts as `z`. A norm that the
    run's first steps had as well is not an explosion: late in training norms are small and jump about. Once they are
    a hundredth of those, it takes `ratio` times those. Nor is one that the trainer clips, to
    sqrt(`ratio`) times the level at most, where this rule has no treatment of its own: it did not reach the weights.

    With `paths`, the norm of those parameters together. The incident names the paths that left their own level
    (running mean of the log), the first of them in backward order.

    Source: robust z on the log with flagged values left out had the fewest false alarms of eleven published spike
    rules (OLMo, llm.c, Megatron, llm-foundry, ZClip arXiv 2504.02507); the gradient norm leads the loss.

    Args:
        z: standard deviations above the median that are too many at once.
        z_again: as many, at two judgements running.
        ratio: times the median that is too much. Above 1.
        ceiling: times the median at which the noise of the run is no excuse.
        window: accepted norms remembered.
        min_samples: accepted norms needed before any is flagged.
        sigma_floor: least standard deviation of the log norm.
        patience: rejected norms running after which theirs is the new level.
    """

    z: float = 16.0
    z_again: float = 5.0
    ratio: float = 10.0
    ceiling: float = 200.0
    window: int = 128
    min_samples: int = 20
    sigma_floor: float = 0.05
    patience: int = 64
    advice: str = (
        "Usually one bad batch (labels, a loss summed instead of averaged, a very long sequence), or a learning rate "
        "at the edge of stability. Look at the batch; clip by global norm (`then: [clip_to_limit]`); lower the "
        "learning rate or lengthen its warm-up; under Adam lower beta2."
    )

    enough = 20
    needs = frozenset({"grad_norm", "trainer_clip"})
    order = "backward"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("z", self.z > 0, 0, "above")
        self._require("z_again", 0 < self.z_again <= self.z, f"{self.z} (`z`)", "above 0 and at most")
        self._require("ratio", self.ratio > 1, 1, "above")
        self._require("ceiling", self.ceiling >= self.ratio, f"{self.ratio} (`ratio`)")
        self._require("window", self.window >= 8, 8)
        self._require("min_samples", 4 <= self.min_samples <= self.window, f"{self.window} (`window`)", "4 to")
        self._require("sigma_floor", self.sigma_floor > 0, 0, "above")
        self._require("patience", self.patience >= 2, 2)

    def init(self) -> State:
        return {"window": (), "rejected": (), "first": (), "suspicious": None, "again": False, "per_path": {}}

    def limit(self, state: State) -> float | None:
        """Return the norm above which one is not accepted as usual (and, a second time running, fires)."""
        if len(state["window"]) < self.min_samples:
            return None
        suspicious, _ = self._bars(state)
        return math.exp(suspicious)

    def alarm(self, state: State) -> float | None:
        if len(state["window"]) < self.min_samples:
            return None
        suspicious, alarm = self._bars(state)
        return math.exp(suspicious if state["again"] else alarm)

    def calm(self, state: State, records: int) -> float:
        if len(state["window"]) < self.min_samples:
            # Its first baseline may come to be within these records.
            return math.inf if len(state["window"]) + records < self.min_samples else 0.0
        if state["again"] or state["rejected"]:
            return 0.0
        return math.exp(self._unsuspicious(state["window"], records))

    def _unsuspicious(self, window: Window, records: int) -> float:
        """Return a log norm that is below every bar of so many records from now on.

        While n values leave the window and n others come in its median can't fall by more than n places, and nothing
        is suspicious below sqrt(`ratio`) times it.
        """
        return sorted(window)[max(0, (len(window) - 1) // 2 - records)] + math.log(self.ratio) / 2

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        norm = self._norm(record)
        if not (math.isfinite(norm) and norm > 0):
            return self.unjudged(record, "the gradient norm is zero, non-finite or unknown"), state
        log_norm = math.log(norm)
        if len(state["window"]) < self.min_samples:
            return self.unjudged(record, "too few norms seen"), self._accept(record, state, log_norm)
        suspicious, alarm = self._bars(state)
        if not log_norm > suspicious:
            return self.clear(record), self._accept(record, state, log_norm)
        fires = (log_norm > alarm or state["again"]) and not self._was_clipped(record, state)
        limit = math.exp(suspicious if state["again"] else alarm)
        findings = self._findings(record, state, norm, limit) if fires else self.clear(record)
        return findings, self._reject(record, state, log_norm, fires)

    def pass_over(self, block: Block, state: State) -> Passed | None:
        window, n = state["window"], len(block)
        if self.paths != ("*",) or len(window) < self.min_samples or state["again"] or state["rejected"]:
            return None
        if not block.has_positive_norms or (logs := block.log_grad_norms) is None:
            return None
        log_norms = tuple(map(math.log, block.norms))
        certain = self._unsuspicious(window, n)
        for k, log_norm in enumerate(log_norms):
            if log_norm > certain:
                known = (*state["first"], *log_norms[:k])[:20]
                now = {**state, "window": (*window, *log_norms[:k])[-self.window :], "first": known}
                if log_norm > self._bars(now)[0]:
                    return None
        past = state["per_path"].get("log_norm")
        past = np.full(len(block.index), np.nan) if past is None else past
        levels = {"log_norm": stream_over(past, logs[0], 0.95, logs[1])}
        first = (*state["first"], *log_norms)[:20]
        window = (*window, *log_norms)[-self.window :]
        return Passed({**state, "window": window, "first": first, "per_path": levels}, n)

    def _norm(self, record: StepRecord) -> float:
        if self.paths == ("*",):
            return record.global_norm
        column = record.columns.get("grad_norm")
        if column is None:
            return math.nan
        chosen = column[select(record.index, self.paths) & record.measured("grad_norm")]
        return float(np.sqrt(np.sum(np.square(chosen)))) if len(chosen) else math.nan

    def _was_clipped(self, record: StepRecord, state: State) -> bool:
        """Return whether a norm that is clipped behind this look will not reach the optimizer.

        By what the trainer is set to: what the optimizer got is known when it is too late to act.
        """
        applied = record.scalars.get("trainer_clip", math.inf)
        return not self.then and applied < math.exp(median(state["window"])) * self.ratio**0.5

    def _bars(self, state: State) -> tuple[float, float]:
        """Return the log norms above which one is suspicious, and flagged at once."""
        center, sigma, count = level(state["window"], self.sigma_floor)
        lately = level(state["window"][-32:], self.sigma_floor).sigma
        # By two standard errors of so short a window's.
        sigma = lately if lately > 1.4 * sigma else sigma
        # A cold window knows little of the noise.
        caution = 5.0 if count < min(64, self.window) else 1.0
        ratio = math.log(caution * self.ratio)
        # The third largest of the first twenty: one odd step at the start does not count.
        early = sorted(state["first"])[-3] if len(state["first"]) > 2 else -math.inf
        if center < early - math.log(100):
            # A model that has fitted its data: one sample it gets wrong is a thousandfold spike, and harmless.
            early += math.log(self.ratio)
        suspicious = max(self.z_again * sigma, ratio / 2)
        alarm = max(min(self.z * sigma, math.log(caution * self.ceiling)), self.z_again * sigma, ratio)
        return max(center + suspicious, early), max(center + alarm, early)

    def _accept(self, record: StepRecord, state: State, log_norm: float) -> State:
        window = state["window"]
        if state["suspicious"] is not None:
            window = push(window, state["suspicious"], self.window)
        window = push(window, log_norm, self.window)
        first = state["first"] if len(state["first"]) >= 20 else (*state["first"], log_norm)
        levels = self._levels(record, state)
        return {
            "window": window,
            "rejected": (),
            "first": first,
            "suspicious": None,
            "again": False,
            "per_path": levels,
        }

    def _reject(self, record: StepRecord, state: State, log_norm: float, fires: bool) -> State:
        rejected: Window = (*state["rejected"], log_norm)
        if len(rejected) >= self.patience:
            # A level that stays is the level: the data or the objective changed.
            levels = self._levels(record, state, decay=0.0)
            return {**self.init(), "window": rejected, "first": state["first"], "per_path": levels}
        return {**state, "rejected": rejected, "suspicious": None if fires else log_norm, "again": True}

    def _levels(self, record: StepRecord, state: State, decay: float = 0.95) -> dict[str, Floats]:
        column = record.columns.get("grad_norm")
        if column is None:
            return dict(state["per_path"])
        with np.errstate(all="ignore"):
            logs = np.log(column)
        past = state["per_path"].get("log_norm")
        past = np.full(len(record.index), np.nan) if past is None else past
        usable = np.isfinite(logs) & record.measured("grad_norm")
        return {"log_norm": stream(past, logs, decay, usable)}

    def _findings(self, record: StepRecord, state: State, norm: float, limit: float) -> Findings:
        center = math.exp(median(state["window"]))
        what = "global gradient norm" if self.paths == ("*",) else "gradient norm of these paths together"
        text = f"{what} {{value:.3g}}, {norm / center:.3g} times its recent level {center:.3g}"
        if record.loss < _FAR_BELOW:
            text += f"; the loss is {record.loss:.3g}: check the sign of its terms"
        whole = self.whole(record, True, norm, limit, text)
        past, column = state["per_path"].get("log_norm"), record.columns.get("grad_norm")
        if past is None or column is None:
            return whole
        with np.errstate(all="ignore"):
            own = select(record.index, self.paths) & record.measured("grad_norm")
            jumps = np.where(own, np.log(column) - past, np.nan)
            jumped = jumps > math.log(self.ratio) / 2
        if jumped.any():
            far = int(np.nanargmax(jumps))
            told = f"{column[far]:.3g}, {math.exp(jumps[far]):.3g} times its own level"
            text += f"; furthest out {record.index.paths[far].replace('{', '{{').replace('}', '}}')}: {told}"
        # The whole first: the number is its, and no layer's.
        positions = np.append(len(record.index), np.flatnonzero(jumped))
        n = len(positions)
        return Findings(self, record, positions, np.full(n, norm), np.full(n, limit), text=text)
