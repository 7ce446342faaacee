"""Training that begins anew without anybody saying so."""

from __future__ import annotations

import math

import numpy as np

from ..records import StepRecord
from ._block import Block, Passed
from ._findings import Findings
from ._rule import Rule, State
from ._selection import select
from ._windows import Progress, median, progress

__all__ = ["Restarted"]


class Restarted(Rule):
    """Flags weights that were started anew in mid run: loss and weights are back where they began.

    The loss had fallen by `fall` of its first level and jumped back above `back` of that fall within a few steps; and
    the weights' norms, which had moved away from their first ones, are nearer to these than half the way. No step of
    the optimizer's leads there.

    Args:
        fall: share of the first loss that must have been learned.
        back: share of what was learned that must be lost.
    """

    fall: float = 0.2
    back: float = 0.6
    severity: str = "critical"
    advice: str = (
        "The weights were overwritten or initialised again: a checkpoint that did not load (`strict=False` with other "
        "names, another prefix), a resume that builds the model anew, averaged or old weights written back. Compare "
        "the names in the checkpoint with those of the model."
    )

    is_core = False
    needs = frozenset({"loss", "param_norm"})
    awaits = frozenset({"param_norm"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("fall", 0 < self.fall < 1, "0 and below 1", "above")
        self._require("back", 0 < self.back <= 1, "0 and at most 1", "above")

    def init(self) -> State:
        jump = {"jump": -1, "from": math.nan, "to": math.nan}
        return {"loss": Progress(), **jump, "per_path": {}, "far": 0.0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        state = self._heard(record.loss, record.num_samples, record.step, state)
        if "param_norm" not in record.columns:
            return self.unjudged(record, "no weight was measured"), state
        norms, first = record.columns["param_norm"], state["per_path"].get("first")
        chosen = select(record.index, self.paths, min_ndim=2) & record.measured("param_norm") & (norms > 0)
        if first is None or not (chosen & (first > 0)).any():
            state = {**state, "per_path": {"first": np.where(chosen, norms, 0.0)}}
            return self.unjudged(record, "the first measurement"), state
        chosen &= first > 0
        far = float(np.median(np.abs(np.log(norms[chosen] / first[chosen]))))
        was, jump = state["far"], state["jump"]
        anew = jump >= 0 and was > 0.02 and far < 0.5 * was
        text = (
            f"at step {jump} the loss went back from {state['from']:.4g} to {{value:.4g}}, weights to their first norms"
        )
        state = {**state, "far": far, "jump": -1}
        return self.whole(record, anew, state["to"], state["from"], text), state

    def _heard(self, value: float, samples: int, step: int, state: State) -> State:
        """Take one loss in; remember a jump back to where the losses began."""
        past = Progress(*state["loss"])
        loss = progress(past, value, samples)
        if past.seen < 30 or not math.isfinite(value):
            return {**state, "loss": tuple(loss)}
        start, now = past.start, median(past.recent[-20:])
        learned = start - now
        jumped = learned > self.fall * abs(start) and value > now + self.back * learned
        # Losses that scatter over half of what was learned go up there by themselves.
        jumped = jumped and max(past.recent[-20:]) < now + 0.5 * self.back * learned
        if jumped and state["jump"] < 0:
            return {**state, "loss": tuple(loss), "jump": step, "from": now, "to": value}
        return {**state, "loss": tuple(loss)}

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if block.has_any(self.awaits):
            return None
        for record in block.records:
            state = self._heard(record.loss, record.num_samples, record.step, state)
        return Passed(state, 0, "no weight was measured")
