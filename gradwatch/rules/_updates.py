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

__all__ = ["NotUpdating", "UpdateTooLarge", "UpdateTooSmall", "clipped_to_nothing", "is_effective", "usual_update"]


def is_effective(record: StepRecord) -> bool:
    """Return whether the optimizer was free to move the weights at this step."""
    return record.lr != 0 and not record.skipped and not record.scalars.get("amp_overflow", 0.0) > 0


def usual_update(record: StepRecord) -> float:
    """Return the median weight's update over its norm; 0 where none was measured.

    A weight that starts near zero has a large one at any learning rate.
    """
    if "update_ratio" not in record.columns:
        return 0.0
    chosen = select(record.index, "*", min_ndim=2) & record.measured("update_ratio")
    ratios = record.columns["update_ratio"][chosen & np.isfinite(record.columns["update_ratio"])]
    return float(np.median(ratios)) if len(ratios) else 0.0


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
    since weights that begin at zero have infinite ones; and so the median of the first steps' is remembered: where most
    weights were moved by more than `early` of their norm at a step, and the loss is no better after 100 steps than
    before the first, their beginning was lost. Under a normalisation they may have grown since, and move little now.

    Args:
        ratio: norm(update) / norm(weight) that is too much.
        early: as much of three quarters of the weights, in the first `first` steps.
        first: steps whose updates are remembered.
        stuck: share of its first level by which the loss must have fallen to be improving.
    """

    ratio: float = 0.1
    early: float = 0.5
    first: int = 20
    stuck: float = 0.5
    for_steps: int = 20
    advice: str = "Usually the learning rate is too high. Lower it by 3 to 10; lengthen its warm-up; clip gradients."

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("ratio", self.ratio > 0, 0, "above")
        self._require("early", self.early > 0, 0, "above")

    def init(self) -> State:
        return {**super().init(), "early": 0.0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        early = state["early"]
        if "update_ratio" in record.columns and Progress(*state["loss"]).seen < self.first:
            early = max(early, self._of_most(record))
        findings, after = super().judge(record, state)
        state = {**after, "early": early}
        loss = Progress(*after["loss"])
        lost = early > self.early and loss.is_stuck(_NO_BETTER)
        if len(findings) or findings.judged is False or not lost:
            return findings, state
        text = (
            f"in the first {self.first} steps most weights moved by {{value:.2g}} of their norm at a step, and the "
            f"loss is no better since: {loss.now:.4g}, first {loss.start:.4g}"
        )
        return self.whole(record, True, early, self.early, text), state

    def _of_most(self, record: StepRecord) -> float:
        """Return the update that three quarters of the weights exceed; 0 where none was measured."""
        ratios = record.columns["update_ratio"]
        judged = select(record.index, self.paths, min_ndim=2) & record.measured("update_ratio") & np.isfinite(ratios)
        return float(np.quantile(ratios[judged], 0.25)) if judged.any() else 0.0

    def pass_over(self, block: Block, state: State) -> Passed | None:
        passed = super().pass_over(block, state)
        return None if passed is None else passed._replace(state={**passed.state, "early": state["early"]})

    @property
    def _limit(self) -> float:
        return self.ratio


_NO_BETTER = 0.05
"""Share of its first level by which a loss has fallen that is no better."""


def _left_by_a_clip(record: StepRecord) -> float:
    """Return which share of the gradient is left after treatment, or a clip of the trainer's."""
    applied, norm = record.global_norm_applied, record.global_norm
    return applied / norm if applied is not None and 0 < applied < norm < math.inf else 1.0


def clipped_to_nothing(record: StepRecord) -> str:
    """Return that a clip leaves next to nothing of the gradient, as a phrase; "" where it does not."""
    left = _left_by_a_clip(record)
    norm = record.global_norm
    return f"gradients are clipped from a norm of {norm:.2g} to {left * norm:.2g}" if left < 0.01 else ""


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
        "Usually the learning rate is too low, gradients vanish in saturated units, or a clip is far below their norm. "
        "Raise the learning "
        "rate by 3 to 10; check that the loss is not divided twice; under Adam check epsilon against the size of the "
        "gradients."
    )

    needs = frozenset({"update_ratio", "loss", "lr", "global_norm_applied"})
    low_is_worse = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("ratio", self.ratio > 0, 0, "above")

    def init(self) -> State:
        return {**super().init(), "lr": (), "rises": False}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        findings, after = super().judge(record, state)
        state = {**after, **_rates(state, record.lr)}
        if len(findings):
            findings.text += self._because(record, state)
        return findings, state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        passed = super().pass_over(block, state)
        if passed is None:
            return None
        rates = state
        for record in block.records:
            rates = _rates(rates, record.lr)
        return passed._replace(state={**passed.state, "lr": rates["lr"], "rises": rates["rises"]})

    @staticmethod
    def _because(record: StepRecord, state: State) -> str:
        """Return what a clip or the learning rate has to do with it, as a phrase."""
        lr = record.lr
        if clipped := clipped_to_nothing(record):
            return f", because {clipped}"
        if not (math.isfinite(lr) and state["lr"]):
            return ""
        first, highest = state["lr"]
        if state["rises"] and lr > 1.5 * first:
            return f", and the learning rate ({lr:.2g}) still rises: its warm-up is not over"
        if lr < 0.1 * highest:
            return f", because the learning rate ({lr:.2g}) is {lr / highest:.1g} of its highest"
        return f", at a learning rate of {lr:.2g}"

    @property
    def _limit(self) -> float:
        return self.ratio


def _rates(state: State, lr: float) -> State:
    """Return the first learning rate above zero and the highest, and whether the present one is above all before."""
    if not (math.isfinite(lr) and lr > 0):
        return {"lr": state["lr"], "rises": state["rises"]}
    first, highest = state["lr"] or (lr, lr)
    return {"lr": (first, max(highest, lr)), "rises": lr > highest}


class NotUpdating(Rule):
    """Flags parameters that never move: in no optimizer though they require a gradient, or left as they were.

    A parameter is left as it was when every update measured so far is exactly zero on steps with a gradient and a
    learning rate above zero that were not skipped; not where it has 16 bits, which may round its updates away. One
    update above zero clears it for good: a converged model may round its updates to nothing. A model without any
    trainable parameter in an optimizer is flagged as a whole.
    """

    severity: str = "critical"
    for_steps: int = 20
    advice: str = (
        "The optimizer does not hold these parameters: it was made before they were (or before the model was copied, "
        "moved or replaced), they were left out of its groups, or they are frozen. Make the optimizer from the model "
        "that is trained; check `requires_grad`."
    )

    is_core = False
    needs = frozenset({"update_norm", "update_lost", "num_trainable", "global_norm_applied"})
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
        # A gradient so small that float32 rounds its update away has vanished, or was clipped to next to nothing; that
        # is another rule's business.
        norms = record.columns.get("param_norm")
        if grads is not None and norms is not None and math.isfinite(record.lr):
            has_grad &= ~(grads * _left_by_a_clip(record) * record.lr < 1e-6 * norms)
        # In 16 bits usual updates are rounded away, too: `updates_rounded_away` tells of these.
        has_grad &= ~record.measured("update_lost")
        still = select(record.index, self.paths) & measured & has_grad & ~moved & record.accounted
        return still, {"per_path": {"moved": moved}}
