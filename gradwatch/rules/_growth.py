"""The slow way up: gradients that grow over hundreds of steps."""

from __future__ import annotations

import math

from ..records import StepRecord
from ._block import Block, Passed
from ._findings import Findings
from ._kinds import VALUES, is_of
from ._rule import Rule, State
from ._windows import Progress, median, progress, progress_over

__all__ = ["GradientGrowth"]

_BLOCK = 50


class GradientGrowth(Rule):
    """Flags a gradient norm that has grown `ratio` times over a delayed baseline, while the loss does not get better.

    The median of the last 20 norms against the median of those 500 to 1,000 steps ago, or, earlier than that, against
    the largest of the first 100. Growth alone is no fault (a warm-up, branches that begin at zero, a plateau that
    breaks), so the loss must be stuck, above where it began, or below zero by three times its first level. Where values
    are learned from themselves (reinforcement learning, target networks) gradients grow with them: not judged.

    Source: the delayed window of llm-foundry (MosaicML), the early maximum of Megatron-LM.

    Args:
        ratio: times the baseline.
        stuck: share of its first level by which the loss must have fallen to be improving.
    """

    ratio: float = 10.0
    stuck: float = 0.3
    severity: str = "critical"
    for_steps: int = 5
    advice: str = (
        "Usually a learning rate too high for this depth, missing normalisation, a recurrent net without clipping, or "
        "a loss of the wrong sign. Clip by global norm; lower the learning rate; add normalisation or weight decay."
    )

    is_core = False
    needs = frozenset({"grad_norm", "loss", *VALUES})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("ratio", self.ratio > 1, 1, "above")

    def init(self) -> State:
        # Medians of blocks of 50 norms, the last 21 of them: 1,050 steps.
        return {"loss": Progress(), "block": (), "blocks": (), "early": 0.0, "seen": 0, "recent": ()}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        loss = progress(Progress(*state["loss"]), record.loss, record.num_samples)
        state = {**state, "loss": tuple(loss)}
        norm = record.global_norm
        if not (math.isfinite(norm) and norm > 0):
            return self.unjudged(record, "the gradient norm is zero, non-finite or unknown"), state
        state = self._remember(norm, state)
        if state["seen"] < 120:
            return self.unjudged(record, "fewer than 120 norms"), state
        if loss.seen and not (loss.is_stuck(self.stuck) or loss.now < loss.start - 3 * abs(loss.start)):
            return self.clear(record), state
        if is_of(record, VALUES):
            return self.unjudged(record, "its gradients grow with its values"), state
        base = self._base(state)
        now, limit = median(state["recent"]), self.ratio * base
        text = f"gradient norm {{value:.3g}}, it was {base:.3g}"
        return self.whole(record, now > limit, now, limit, text), state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if not block.has_positive_norms:
            return None
        after = state
        for norm in block.norms:
            after = self._remember(norm, after)
        # No median of the last norms can be above the largest of them; the baseline changes once in a block at most.
        highest = max(*state["recent"], *block.norms) if state["recent"] else max(block.norms)
        if after["seen"] >= 120 and highest > self.ratio * min(self._base(state), self._base(after)):
            return None
        loss = progress_over(Progress(*state["loss"]), block.losses, block.samples)
        early = min(max(119 - state["seen"], 0), len(block))
        judged = len(block) - early if len(block) <= _BLOCK else 0
        return Passed({**after, "loss": tuple(loss)}, judged, "fewer than 120 norms" * (early > 0))

    @staticmethod
    def _base(state: State) -> float:
        return median(state["blocks"][-20:-10]) if len(state["blocks"]) >= 20 else float(state["early"])

    @staticmethod
    def _remember(norm: float, state: State) -> State:
        block, blocks = (*state["block"], norm), state["blocks"]
        if len(block) >= _BLOCK:
            block, blocks = (), (*blocks[-20:], median(block))
        early = max(state["early"], norm) if state["seen"] < 100 else state["early"]
        recent = (*state["recent"][-19:], norm)
        seen = state["seen"] + 1
        return {**state, "block": block, "blocks": blocks, "early": early, "recent": recent, "seen": seen}
