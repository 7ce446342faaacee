"""What batches and targets look like from step to step, and beside the outputs: faults of the data's way."""

from __future__ import annotations

import math

from ..records import StepRecord
from ._block import Block, Passed
from ._findings import Findings
from ._rule import Rule, State
from ._windows import Progress, median, progress, progress_over

__all__ = ["RepeatedBatch", "RepeatedTargets", "TargetOutliers", "TargetScale"]

_OF_INPUTS = ("input_mean", "input_std", "input_absmax")
_OF_TARGETS = ("target_min", "target_max", "target_variance", "target_entropy")


class RepeatedBatch(Rule):
    """Flags a training whose every batch is the same one, which it has learned by heart and no more.

    Mean, deviation and largest entry of the inputs and the numbers of the targets are the same to the last bit at every
    measured step, two that follow each other among them. A small set of data that fits into one batch is repeated by
    right: so the training loss must lie below `learned` of where it began, and the validation loss, at `evaluations`
    running, above five times that and above `left` of the training loss's beginning.

    Args:
        learned: share of its first level below which a loss is learned by heart.
        left: share of that level which the validation loss is above.
        measured: batches that must be the same.
        evaluations: running.
    """

    learned: float = 0.1
    left: float = 0.25
    measured: int = 5
    evaluations: int = 2
    advice: str = (
        "Each step gets the same samples: a generator that is seeded anew at every step, a loader's first batch taken "
        "again and again (`next(iter(loader))`), an index that never moves. Shuffle the whole training set; if these "
        "are all the data there are, the model learns them by heart."
    )

    is_core = False
    needs = frozenset({"loss", "val_loss", *_OF_INPUTS, *_OF_TARGETS})
    awaits = frozenset({"val_loss", *_OF_INPUTS})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("learned", 0 < self.learned < 1, "0 and below 1", "above")
        self._require("measured", self.measured >= 3, 3)

    def init(self) -> State:
        return {"loss": Progress(), "mark": None, "same": 0, "step": -2, "adjoin": False, "val": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        loss = progress(Progress(*state["loss"]), record.loss, record.num_samples)
        state = self._compared(record, {**state, "loss": tuple(loss)})
        val = record.scalars.get("val_loss", math.nan)
        repeated = state["same"] >= self.measured and state["adjoin"]
        if not math.isfinite(val) or not repeated or not loss.seen:
            reason = "no validation loss, or batches differ" if not repeated else "no validation loss"
            return self.unjudged(record, reason), state
        by_heart = 0 < loss.now < self.learned * loss.start
        far = val > max(5 * loss.now, self.left * loss.start)
        state = {**state, "val": state["val"] + 1 if by_heart and far else 0}
        text = (
            f"{state['same']} measured batches are all the same one; training loss {loss.now:.3g} of {loss.start:.3g} "
            "at first, validation loss {value:.3g}"
        )
        return self.whole(record, state["val"] >= self.evaluations, val, self.left * loss.start, text), state

    def _compared(self, record: StepRecord, state: State) -> State:
        """Take in whether this batch, if it was measured, is the one before."""
        known = [record.scalars.get(name, math.nan) for name in (*_OF_INPUTS, *_OF_TARGETS)]
        # Rows with a single one in them are alike to their sums: the targets must tell batches apart.
        if not all(map(math.isfinite, known[:3])) or not any(map(math.isfinite, known[5:])):
            return state
        mark = tuple(-math.inf if math.isnan(value) else value for value in known)
        same = state["mark"] is None or tuple(state["mark"]) == mark
        return {
            **state,
            "mark": mark,
            "same": state["same"] + 1 if same else -math.inf,
            "step": record.step,
            "adjoin": state["adjoin"] or record.step == state["step"] + 1,
        }

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if block.has_any(self.awaits):
            return None
        loss = progress_over(Progress(*state["loss"]), block.losses, block.samples)
        return Passed({**state, "loss": tuple(loss)}, 0, "no validation loss, or batches differ")


class RepeatedTargets(Rule):
    """Flags batches in which most targets are one and the same number, and another one in each batch.

    Numbers that are whole are left out: classes and counts repeat by right. So are numbers that are the same from batch
    to batch, such as the zeros of a rare event. What is left is a value that was computed once for many samples.

    Args:
        share: of a batch's targets.
        batches: measured running.
    """

    share: float = 0.5
    batches: int = 5
    advice: str = (
        "Many samples got one target: they hold a reference to one array or tensor that is written over (a replay "
        "buffer or a data set that stores `state` instead of `state.copy()`), or a mean or broadcast stands where each "
        "sample's own value should. Copy what is stored; compare the rows of a batch of the data."
    )

    is_core = False
    needs = frozenset({"target_mode", "target_mode_share", "target_is_whole", "batch_size"})
    awaits = frozenset({"target_mode"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("share", 0 < self.share <= 1, "0 and at most 1", "above")
        self._require("batches", self.batches >= 3, 3)

    def init(self) -> State:
        return {"modes": ()}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        mode, share = (record.scalars.get(name, math.nan) for name in ("target_mode", "target_mode_share"))
        if not (math.isfinite(mode) and math.isfinite(share)):
            return self.unjudged(record, "targets are no numbers, or not known"), state
        if record.num_samples and record.num_samples < 16:
            return self.unjudged(record, "batches of fewer than 16"), state
        odd = share >= self.share and mode != round(mode) and share < 1
        modes = (*state["modes"][1 - self.batches :], mode) if odd else ()
        fires = len(modes) >= self.batches and len(set(modes)) == len(modes)
        text = f"{{value:.0%}} of the batch's targets are the same number ({mode:.4g}), another one in every batch"
        return self.whole(record, fires, share, self.share, text), {"modes": modes}


class TargetScale(Rule):
    """Flags numbers to be predicted that are far larger than anything the model gives.

    Their deviation in the batch is above `size`, and above `ratio` times the largest output, at `batches` measured
    batches running after 50 steps: what a unit's weights can reach is small beside what is asked for.

    Args:
        size: of the targets' deviation, that is large.
        ratio: over the largest output.
        batches: measured running.
    """

    size: float = 100.0
    ratio: float = 20.0
    batches: int = 3
    advice: str = (
        "Scale the targets to zero mean and unit deviation (take the logarithm of what spans orders of magnitude, "
        "divide rewards), and scale predictions back afterwards."
    )

    is_core = False
    needs = frozenset({"target_variance", "squared_error", "output_min", "output_max", "target_is_integer"})
    awaits = frozenset({"target_variance"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("size", self.size > 0, 0, "above")
        self._require("ratio", self.ratio >= 1, 1)

    def init(self) -> State:
        return {"running": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        names = ("target_variance", "output_min", "output_max")
        variance, low, high = (record.scalars.get(name, math.nan) for name in names)
        if not all(map(math.isfinite, (variance, low, high))) or record.step < 50:
            return self.unjudged(record, "judged on numbers to be predicted, after 50 steps"), state
        deviation, largest = math.sqrt(max(variance, 0.0)), max(abs(low), abs(high))
        large = deviation > max(self.size, self.ratio * largest)
        running = state["running"] + 1 if large else 0
        text = f"targets deviate by {{value:.3g}} in a batch, the largest output is {largest:.3g}"
        limit = max(self.size, self.ratio * largest)
        return self.whole(record, running >= self.batches, deviation, limit, text), {"running": running}


class TargetOutliers(Rule):
    """Flags a few targets that lie far from all others, where they are what the squared error is made of.

    In one batch the farthest target lies `far` times as far from the median as half of the batch does, and the squared
    error is 100 times that of the usual batch; the usual one has no such target. Rewards that are rare, or prices that
    span orders of magnitude, are so in every batch.

    Args:
        far: median distances.
        batches: measured before it is judged.
    """

    far: float = 300.0
    batches: int = 5
    advice: str = (
        "A few labels are outliers (another unit, a misplaced point, a placeholder such as 9999): these bad batches "
        "throw the weights. Look at the largest targets; repair or drop them; use a Huber loss; clip gradients."
    )

    is_core = False
    needs = frozenset({"target_tail", "squared_error", "target_min", "target_max"})
    awaits = frozenset({"target_tail"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("far", self.far > 1, 1, "above")
        self._require("batches", self.batches >= 3, 3)

    def init(self) -> State:
        return {"tails": (), "errors": (), "worst": 0.0, "seen": math.nan}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        tail, error = (record.scalars.get(name, math.nan) for name in ("target_tail", "squared_error"))
        if not (math.isfinite(tail) and math.isfinite(error)):
            return self.unjudged(record, "targets are no numbers, or not known"), state
        ends = [record.scalars.get(f"target_{end}", math.nan) for end in ("min", "max")]
        worst = tail > state["worst"]
        state = {
            "tails": (*state["tails"][-31:], tail),
            "errors": (*state["errors"][-31:], error),
            "worst": max(tail, state["worst"]),
            "seen": max(ends, key=abs) if worst else state["seen"],
        }
        if len(state["tails"]) < self.batches:
            return self.unjudged(record, f"fewer than {self.batches} batches were measured"), state
        usual = median(tuple(sorted(state["errors"])))
        far = [e for t, e in zip(state["tails"], state["errors"], strict=True) if t > self.far and e > 100 * usual]
        calm = median(state["tails"]) < self.far / 10
        text = (
            f"a target of {state['seen']:.4g} lies {{value:.3g}} times as far from the median as half of its batch "
            "does, and the squared error of such a batch is 100 times the usual one"
        )
        return self.whole(record, bool(far) and calm, state["worst"], self.far, text), state
