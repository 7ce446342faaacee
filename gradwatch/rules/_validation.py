"""What validation shows, where a user gives it."""

from __future__ import annotations

import math

from ..records import StepRecord
from ._findings import Findings
from ._rule import Rule, State
from ._windows import Progress, progress

__all__ = ["Overfit", "TrainEvalMismatch", "ValNotLearning"]


class _Evaluations(Rule):
    """Judges when a validation loss is given; the condition must hold at `evaluations` of them running."""

    evaluations: int = 5
    needs = frozenset({"loss", "val_loss"})
    keep_firing_for = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("evaluations", self.evaluations >= 1, 1)

    def init(self) -> State:
        return {"loss": Progress(), "first": None, "best": None, "running": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        loss = progress(Progress(*state["loss"]), record.loss, record.num_samples)
        value = record.scalars.get(self._value, math.nan)
        if not math.isfinite(value):
            return self.unjudged(record, f"`{self._value}` was not given"), {**state, "loss": tuple(loss)}
        state = {**state, "first": value if state["first"] is None else state["first"]}
        limit = self._limit(loss, state)
        running = state["running"] + 1 if value > limit else 0
        best = value if state["best"] is None else min(state["best"], value)
        state = {**state, "loss": tuple(loss), "best": best, "running": running}
        text = self._text(loss, best)
        return self.whole(record, running >= self.evaluations, value, limit, text), state

    @property
    def _value(self) -> str:
        return "val_loss"

    def _limit(self, loss: Progress, state: State) -> float:
        raise NotImplementedError

    def _text(self, loss: Progress, best: float) -> str:
        return f"validation loss {{value:.4g}}, best {best:.4g}, training loss {loss.now:.4g}"


class Overfit(_Evaluations):
    """Flags a validation loss that is above its best by more than `ratio` - 1 of its size, evaluation after evaluation,
    while the training loss is below it.

    Args:
        ratio: times the best validation loss.
        evaluations: running.
    """

    ratio: float = 1.3
    evaluations: int = 5
    advice: str = "The model learns the training set by heart: stop earlier, regularise, augment, or get more data."

    def _limit(self, loss: Progress, state: State) -> float:
        best = state["best"]
        if best is None or not loss.seen:
            return math.inf
        return max(best + (self.ratio - 1) * abs(best), loss.now)


class ValNotLearning(_Evaluations):
    """Flags a validation loss that stays where it began, or where a constant would be, while the training loss falls.

    Any of three, at `evaluations` running:

    * validation loss at least 97 % of its first value and 60 % of the first training loss, which itself has fallen by
      more than a fifth and lies a third lower;
    * validation loss at least 97 % of its first value and 95 % of the first training loss, which itself has fallen by
      more than a twelfth;
    * for a squared error: validation loss above the targets' variance over the batch, which a constant would reach,
      while the training loss is below 90 % of that.

    Args:
        evaluations: running.
    """

    evaluations: int = 5
    advice: str = (
        "What is learned does not carry over: training and validation data are prepared differently, labels of one "
        "are shuffled, or training labels are noise. Evaluate on training data; compare the two pipelines."
    )

    needs = frozenset({"loss", "val_loss", "squared_error", "target_variance"})

    def init(self) -> State:
        return {**super().init(), "measured": 0, "loss_sum": 0.0, "error_sum": 0.0, "variance_sum": 0.0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        error, variance = (record.scalars.get(n, math.nan) for n in ("squared_error", "target_variance"))
        sums = {k: state[k] for k in ("measured", "loss_sum", "error_sum", "variance_sum")}
        if math.isfinite(error) and math.isfinite(variance) and math.isfinite(record.loss):
            sums["measured"] += 1
            sums["loss_sum"] += record.loss
            sums["error_sum"] += error
            sums["variance_sum"] += variance
        findings, after = super().judge(record, {**state, **sums})
        return findings, {**sums, **after}

    def _limit(self, loss: Progress, state: State) -> float:
        first = state["first"]
        if not loss.seen:
            return math.inf
        fall = (loss.start - loss.now) / abs(loss.start) if loss.start else 0.0
        limits = [self._constant(loss, state)]
        unmoved = first - 0.03 * abs(first)
        if fall > 0.2:
            # What was learned before the first evaluation counts, too.
            limits.append(max(unmoved, loss.now + 0.3 * abs(loss.now), loss.start - 0.4 * abs(loss.start)))
        if fall > 0.08:
            limits.append(max(unmoved, loss.start - 0.05 * abs(loss.start)))
        return min(limits)

    @staticmethod
    def _constant(loss: Progress, state: State) -> float:
        """Return the loss of the best constant where the loss is the mean squared error, or nearly; else infinity."""
        n = state["measured"]
        if n < 5 or abs(state["loss_sum"] - state["error_sum"]) > 0.2 * state["error_sum"]:
            return math.inf
        variance = state["variance_sum"] / n
        return variance if variance > 0 and loss.now < 0.9 * variance else math.inf


class TrainEvalMismatch(_Evaluations):
    """Flags a model that is much worse in eval mode than in train mode on the same training data.

    Loss in eval mode above `ratio` times that in train mode, and above it by a tenth of the first level. Batches of
    one are not judged.

    Args:
        ratio: times the loss in train mode.
        evaluations: running.
    """

    ratio: float = 2.0
    evaluations: int = 3
    advice: str = (
        "Usually BatchNorm statistics that do not fit (small batches, momentum, shared layers) or dropout before "
        "BatchNorm. Use larger batches or GroupNorm; check `model.eval()` and `model.train()` calls."
    )

    needs = frozenset({"loss", "train_eval_loss", "batch_size"})

    @property
    def _value(self) -> str:
        return "train_eval_loss"

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if record.scalars.get("batch_size", 2.0) < 2:
            return self.unjudged(record, "batches of one"), state
        return super().judge(record, state)

    def _limit(self, loss: Progress, state: State) -> float:
        if not loss.seen:
            return math.inf
        return loss.now + max((self.ratio - 1) * abs(loss.now), 0.1 * abs(loss.start))

    def _text(self, loss: Progress, best: float) -> str:
        return f"loss in eval mode {{value:.4g}}, in train mode {loss.now:.4g}"
