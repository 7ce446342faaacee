"""What the optimizer does to the weights: too much, too little, nothing."""

from __future__ import annotations

import math

import numpy as np

from ..records import Bools, StepRecord
from ._block import Block, Passed
from ._findings import Findings
from ._rule import Rule, State
from ._selection import select
from ._windows import Progress, progress, progress_over

__all__ = ["NotUpdating", "UpdateTooLarge", "UpdateTooSmall", "is_effective"]


def is_effective(record: StepRecord) -> bool:
    """Return whether the optimizer was free to move the weights at this step."""
    return record.lr != 0 and not record.skipped and not record.scalars.get("amp_overflow", 0.0) > 0


class _UpdateRatio(Rule):
    """Judges update ratios once the loss is known over 100 steps, while it does not improve."""

    stuck: float = 0.5
    is_core = False
    needs = frozenset({"update_ratio", "loss"})

    def init(self) -> State:
        return {"loss": Progress()}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        loss = progress(Progress(*state["loss"]), record.loss, record.num_samples)
        state = {"loss": tuple(loss)}
        if "update_ratio" not in record.columns or not is_effective(record):
            return self.unjudged(record, "no update was measured"), state
        if loss.seen < 100:
            return self.unjudged(record, "the loss is not known over 100 steps"), state
        if not loss.is_stuck(self.stuck):
            return self.clear(record), state
        ratios = record.columns["update_ratio"]
        judged = select(record.index, self.paths, min_ndim=2) & record.measured("update_ratio") & np.isfinite(ratios)
        if self.low_is_worse and "grad_norm" in record.columns:
            # What got no gradient does not move, whatever the learning rate: an expert, a head that waits its turn.
            judged &= record.measured("grad_norm") & (record.columns["grad_norm"] > 0)
        limit = self._limit
        true = judged & (ratios < limit if self.low_is_worse else ratios > limit)
        text = "an update is {value:.2g} of the weight, limit {limit:.2g}"
        return self.over(record, true, judged, ratios, limit, text), state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if "update_ratio" in block.names:
            return None
        loss = progress_over(Progress(*state["loss"]), block.losses, block.samples)
        return Passed({"loss": tuple(loss)}, 0, "no update was measured")

    @property
    def _limit(self) -> float:
        raise NotImplementedError


class UpdateTooLarge(_UpdateRatio):
    """Flags weights that each step changes by more than `ratio` of their norm, while the loss does not improve.

    Source: A. Karpathy's rule of thumb (a ratio near 1e-3); .1 is a hundred times that. Ratios start after 100 steps,
    since weights that begin at zero have infinite ones.

    Args:
        ratio: norm(update) / norm(weight) that is too much.
        stuck: share of its first level by which the loss must have fallen to be improving.
    """

    ratio: float = 0.1
    stuck: float = 0.5
    for_steps: int = 20
    advice: str = "Usually the learning rate is too high. Lower it by 3 to 10; lengthen its warm-up; clip gradients."

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("ratio", self.ratio > 0, 0, "above")

    @property
    def _limit(self) -> float:
        return self.ratio


class UpdateTooSmall(_UpdateRatio):
    """Flags weights that each step changes by less than `ratio` of their norm, while the loss does not improve.

    Args:
        ratio: norm(update) / norm(weight) that is too little.
        stuck: share of its first level by which the loss must have fallen to be improving.
    """

    ratio: float = 1e-5
    stuck: float = 0.3
    for_steps: int = 100
    advice: str = (
        "Usually the learning rate is too low, or gradients vanish. Raise the learning rate by 3 to 10; check that "
        "the loss is not divided twice; under Adam check epsilon against the size of the gradients."
    )

    low_is_worse = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("ratio", self.ratio > 0, 0, "above")

    @property
    def _limit(self) -> float:
        return self.ratio


class NotUpdating(Rule):
    """Flags parameters that never move: in no optimizer though they require a gradient, or left as they were.

    A parameter is left as it was when every update measured so far is exactly zero on steps with a gradient and a
    learning rate above zero that were not skipped. One update above zero clears it for good: a converged model may
    round its updates to nothing. A model without any trainable parameter in an optimizer is flagged as a whole.
    """

    severity: str = "critical"
    for_steps: int = 20
    advice: str = (
        "The optimizer does not hold these parameters: it was made before they were (or before the model was copied, "
        "moved or replaced), they were left out of its groups, or they are frozen. Make the optimizer from the model "
        "that is trained; check `requires_grad`."
    )

    is_core = False
    needs = frozenset({"update_norm", "num_trainable"})
    low_is_worse = True

    def init(self) -> State:
        return {"per_path": {}}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        index = record.index
        trained = record.scalars.get("num_trainable", 1.0) > 0 or (index.in_optimizer & index.trainable).any()
        if not trained and not any(record.unseen):
            return self.whole(record, True, 0.0, 0.0, "no parameter of the model is trained"), state
        left_out = index.is_parameter & index.trainable & ~index.in_optimizer & index.select(self.paths)
        left_out &= record.accounted
        still, state = self._still(record, state)
        judged = np.ones(len(index), np.bool_) if still is None else index.is_parameter
        if still is None and not left_out.any():
            return self.unjudged(record, "no update was measured"), state
        true = left_out if still is None else left_out | still
        judged = left_out if still is None else judged
        what = "it is in no optimizer" if left_out.any() else "updates are exactly zero"
        return self.over(record, true, judged, np.zeros(len(index)), 0.0, what), state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if "update_norm" in block.names or min(block.scalar("num_trainable"), default=1.0) == 0:
            return None
        index = block.index
        if (index.is_parameter & index.trainable & ~index.in_optimizer & index.select(self.paths)).any():
            return None
        return Passed(state, 0, "no update was measured")

    def _still(self, record: StepRecord, state: State) -> tuple[Bools | None, State]:
        if "update_norm" not in record.columns or not is_effective(record):
            return None, state
        updates, measured = record.columns["update_norm"], record.measured("update_norm")
        moved = state["per_path"].get("moved")
        moved = np.zeros(len(record.index), np.bool_) if moved is None else moved
        moved = moved | (measured & (updates != 0))
        grads = record.columns.get("grad_norm")
        has_grad = measured if grads is None else (grads > 0) & record.measured("grad_norm")
        # A gradient so small that float32 rounds its update away has vanished; that is another rule's business.
        norms = record.columns.get("param_norm")
        if grads is not None and norms is not None and math.isfinite(record.lr):
            has_grad &= ~(grads * record.lr < 1e-6 * norms)
        still = select(record.index, self.paths) & measured & has_grad & ~moved & record.accounted
        return still, {"per_path": {"moved": moved}}
