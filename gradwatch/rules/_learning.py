"""The loss does not improve, or the model gives one answer for every input."""

from __future__ import annotations

import math

from ..records import StepRecord
from ._findings import Findings
from ._loss import remember
from ._rule import Rule, State
from ._windows import HEAD, Progress, median

__all__ = ["ConstantOutput", "NotLearning"]


class NotLearning(Rule):
    """Flags a loss that has not fallen: first level minus the median of the last fifth is below `share` of the first.

    Judged when `start` losses were seen, then every `every`, and at the end of a run of 100 losses or more: deep nets
    may lie on a plateau for their first hundreds of steps. Not flagged where the lower quartile of the last fifth is
    30 % below the least of the first losses: then outliers hide what was learned; nor where the loss rose by more than
    half, which is for `diverging`. In batches of fewer than a dozen samples means stand for medians. Works for negative
    losses. Of all single rules the one with the best record on published faulty programs.

    Args:
        share: of the first level by which the loss must have fallen.
        start: losses before the first judgement.
        every: losses between judgements.
    """

    share: float = 0.02
    start: int = 300
    every: int = 500
    severity: str = "critical"
    keep_firing_for: int = 0
    advice: str = (
        "Usually the learning rate (far too low or too high), labels that do not match the inputs, a wrong loss, or "
        "weights that get no gradient. Try to overfit one batch; then change the learning rate by 10 either way; "
        "check labels, the sign of the loss, the last activation and the initialisation."
    )

    needs = frozenset({"loss"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("share", self.share > 0, 0, "above")
        self._require("start", self.start >= 20, 20)
        self._require("every", self.every >= 1, 1)

    def init(self) -> State:
        # Every `stride`-th loss is kept, and the stride doubles when they are too many.
        return {"loss": Progress(), "kept": (), "stride": 1}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        ending = record.scalars.get("end_of_run", 0.0) > 0
        if not math.isfinite(record.loss) and not ending:
            return self.unjudged(record, "no finite loss was given"), state
        state = remember(record.loss, state, record.num_samples)
        loss = Progress(*state["loss"])
        due = loss.seen >= self.start and (loss.seen - self.start) % self.every == 0
        if not (due or (ending and loss.seen >= 100)):
            return self.unjudged(record, f"judged at {self.start} losses and every {self.every} after"), state
        kept = state["kept"]
        recent = sorted(kept[-max(5, len(kept) // 5) :])
        now, easy, easiest = median(tuple(recent)), recent[len(recent) // 4], min(loss.first)
        start = loss.start
        if len(loss.first) > HEAD:
            # Small batches: what is learned shows in how bad the bad ones are, and not in the median.
            start, now = math.fsum(loss.first) / len(loss.first), math.fsum(recent) / len(recent)
        limit = start - self.share * abs(start)
        # Where half of the batches hold an outlier the median says little, and the easy batches say much. What rose
        # by half is left to `diverging`, which asks the gradients, too.
        stuck = limit < now < start + 0.5 * abs(start) and easy > easiest - 0.3 * abs(easiest)
        return self.whole(record, stuck, now, limit, f"loss {now:.4g}, it began at {start:.4g}"), state


class ConstantOutput(Rule):
    """Flags a model that gives the same output for every sample of the batch, while the loss is not near zero.

    Largest variance of an output unit over the batch < `variance` (times the squared size of the outputs where that
    is above 1). Batches of one are not judged. A softmax over one unit is the classic case.

    Args:
        variance: over the batch that is too little.
        min_loss: a loss of at most this size is learned.
    """

    variance: float = 1e-12
    min_loss: float = 1e-4
    severity: str = "critical"
    for_steps: int = 20
    warmup: int = 5
    advice: str = (
        "Usually a softmax over one unit, dead or saturated units before the output, or an input that never reaches "
        "it. Use a sigmoid for one unit; check the last layers' activations and initialisation; lower the learning "
        "rate."
    )

    needs = frozenset({"output_batch_variance"})
    low_is_worse = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("variance", self.variance > 0, 0, "above")

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        variance = record.scalars.get("output_batch_variance", math.nan)
        if not math.isfinite(variance):
            return self.unjudged(record, "the model's output was not measured"), state
        if record.scalars.get("batch_size", 2.0) < 2:
            return self.unjudged(record, "a batch of one has no variance"), state
        if record.has_loss and not abs(record.loss) > self.min_loss:
            return self.clear(record), state
        size = max(abs(record.scalars.get(k, 0.0)) for k in ("output_min", "output_max"))
        limit = self.variance * max(1.0, size * size)
        text = "variance of the output over the batch {value:.2g}"
        return self.whole(record, variance < limit, variance, limit, text), state
