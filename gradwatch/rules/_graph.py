"""What the graph behind outputs and loss shows: ways that are open and should not be, or cut and should not be."""

from __future__ import annotations

import math

import numpy as np

from ..records import Bools, Index, StepRecord
from ._block import Block, Passed
from ._findings import Findings
from ._kinds import has_twin
from ._rule import Rule, State
from ._selection import select

__all__ = ["CutOff", "SeesFuture"]


_SAMPLES = 3
"""Times that outputs must have been sampled, before a module is known to run."""


class SeesFuture(Rule):
    """Flags a model that is to predict the next token and sees it: none of its attention is masked.

    The targets are the tokens of the input one place on, or those of the input itself under a loss that shifts them,
    and every attention behind the outputs (as `scaled_dot_product_attention` computes it) is neither causal nor given a
    mask. Attention that is computed otherwise is not judged.

    Args:
        batches: measured running.
    """

    batches: int = 2
    severity: str = "critical"
    advice: str = (
        "The causal mask is missing: each place sees the token that it is to predict, which leaks the future. Give "
        "`is_causal=True` or a mask to the attention; a loss that looks too good is then no longer to be had."
    )

    is_core = False
    needs = frozenset({"attention_sees_all", "target_at_1", "target_at_0", "cross_entropy_shifted", "loss"})
    awaits = frozenset({"attention_sees_all"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("batches", self.batches >= 1, 1)

    def init(self) -> State:
        return {"running": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        share = record.scalars.get("attention_sees_all", math.nan)
        next_ones, same = (record.scalars.get(name, 0.0) for name in ("target_at_1", "target_at_0"))
        shifted = record.scalars.get("cross_entropy_shifted", math.nan)
        follows = same >= 0.95 and abs(record.loss - shifted) <= 0.01 * abs(shifted)
        if math.isnan(share) or not (next_ones >= 0.95 or follows):
            return self.unjudged(record, "no attention was seen, or the next token is not what is predicted"), state
        running = state["running"] + 1 if share == 1 else 0
        text = "the next token is to be predicted, and {value:.0%} of the attention sees every place"
        return self.whole(record, running >= self.batches, share, 0.0, text), {"running": running}


class CutOff(Rule):
    """Flags weights that the optimizer holds and that never got a gradient, though their module runs.

    In `steps` steps no gradient, or one of exactly zero, came back to the weights of two or more dimensions of a module
    that gave an output every time that outputs were sampled: what it gives never reaches the loss. A module that has a
    twin (another one with parameters of the same names and shapes, which does get gradients) is a target network or a
    teacher, and is left out; so is a training where most weights are so, which is for `dead`, and one of several
    optimizers that step in turns.

    Args:
        steps: from the beginning, without a gradient.
        share: of all weights that may be so, at most.
    """

    steps: int = 100
    share: float = 0.5
    advice: str = (
        "Something cuts the way from these weights to the loss: a `.detach()`, `.item()`, `no_grad` or argmax behind "
        "them, a gate that is not multiplied in, an output that nobody uses. Check that the loss depends on them; if "
        "they are meant to stay as they are, set `requires_grad_(False)`."
    )

    is_core = False
    needs = frozenset({"grad_norm", "output_std", "optimizer"})
    low_is_worse = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("steps", self.steps >= 1, 1)
        self._require("share", 0 < self.share <= 1, "0 and at most 1", "above")

    def init(self) -> State:
        return {"seen": 0, "samples": 0, "per_path": {}}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if "grad_norm" not in record.columns or "optimizer" in record.scalars or not record.has_gradient:
            return self.unjudged(record, "no gradient was measured, or optimizers step in turns"), state
        index, norms = record.index, record.columns["grad_norm"]
        state = self._after(index, state, (record.measured("grad_norm") & (norms != 0))[None])
        if "output_std" in record.columns:
            ran = state["per_path"].get("ran", np.zeros(len(index))) + _ran(record)
            state = {**state, "samples": state["samples"] + 1, "per_path": {**state["per_path"], "ran": ran}}
        if state["seen"] < self.steps or state["samples"] < _SAMPLES:
            return self.unjudged(record, f"fewer than {self.steps} steps"), state
        weights = select(index, self.paths, min_ndim=2) & record.accounted
        cut = weights & (state["per_path"]["had"] == 0) & (state["per_path"]["ran"] >= state["samples"])
        if cut.any():
            cut &= ~has_twin(index, cut)
        if cut.sum() > self.share * weights.sum():
            cut[:] = False
        text = f"no gradient in {state['seen']} steps, though the module runs"
        return self.over(record, cut, weights, np.zeros(len(index)), 0.0, text), state

    def _after(self, index: Index, state: State, has_gradient: Bools) -> State:
        had = state["per_path"].get("had")
        had = np.zeros(len(index)) if had is None else had
        per_path = {**state["per_path"], "had": np.maximum(had, has_gradient.any(axis=0))}
        return {**state, "seen": state["seen"] + len(has_gradient), "per_path": per_path}

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if block.grad_norms is None or block.has_any({"optimizer", "output_std"}):
            return None
        norms, measured = block.grad_norms
        after = self._after(block.index, state, measured & (norms != 0))
        weights = select(block.index, self.paths, min_ndim=2)
        if after["seen"] >= self.steps and (after["per_path"]["had"][weights] == 0).any():
            return None
        early = min(max(self.steps - 1 - state["seen"], 0), len(block)) if state["samples"] >= _SAMPLES else len(block)
        return Passed(after, len(block) - early, f"fewer than {self.steps} steps" * (early > 0))


def _ran(record: StepRecord) -> Bools:
    """Return which parameters' modules gave an output, at a step at which outputs were sampled."""
    index, ran = record.index, record.measured("output_std")
    owners = [index.positions.get(path.rpartition(".")[0], -1) for path in index.paths]
    return np.array([p >= 0 and bool(ran[p]) for p in owners]) & index.is_parameter
