"""Gradients that are too small: vanishing over depth, or exactly zero."""

from __future__ import annotations

import re
from weakref import WeakKeyDictionary

import numpy as np

from ..records import Bools, Index, StepRecord
from ._block import Block, Passed
from ._findings import Findings
from ._rule import Rule, State
from ._selection import select
from ._windows import Progress, progress, progress_over

__all__ = ["Dead", "Vanishing"]


class Vanishing(Rule):
    """Flags weights whose gradient is a tiny share of the largest layer's, while the loss does not improve.

    norm / largest norm < `ratio`, and the loss fell by less than `stuck` of its first level. A converged model has
    small gradients by definition, hence the second condition; without a loss the rule is silent. Like is compared with
    like: layers of one type, and only where the small ones come before all others of that type: an embedding, a gate or
    a head has gradients of another size by right, and so have queries and keys while attention is even: told by their
    names. Gradients of exactly zero are `dead`, not vanishing. Biases are left out.

    Source: X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks",
    AISTATS 2010; ratio to the largest layer, since absolute sizes depend on the loss, the batch and the width.

    Args:
        ratio: share of the largest layer's norm that is too little. In (0, 1).
        stuck: share of its first level by which the loss must have fallen to be improving.
    """

    ratio: float = 1e-3
    stuck: float = 0.3
    severity: str = "critical"
    for_steps: int = 50
    advice: str = (
        "Usually saturating activations (sigmoid, tanh) in a deep net, or weights that start too small. Use ReLU or "
        "GELU with He initialisation; add normalisation or residual connections; use fewer layers."
    )

    needs = frozenset({"grad_norm", "loss"})
    order = "backward"
    low_is_worse = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("ratio", 0 < self.ratio < 1, "0 and below 1", "above")
        self._require("stuck", self.stuck > 0, 0, "above")

    def init(self) -> State:
        return {"loss": Progress()}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        loss = progress(Progress(*state["loss"]), record.loss, record.num_samples)
        state = {"loss": tuple(loss)}
        if loss.seen < 100 or "grad_norm" not in record.columns:
            return self.unjudged(record, "the loss is not known over 100 steps"), state
        if not loss.is_stuck(self.stuck):
            return self.clear(record), state
        norms = record.columns["grad_norm"]
        judged = select(record.index, self.paths, min_ndim=2) & record.measured("grad_norm") & np.isfinite(norms)
        judged &= ~_match(record.index)
        if judged.sum() < 2:
            return self.unjudged(record, "fewer than two weights with a gradient"), state
        fires, limits = np.zeros(len(norms), np.bool_), np.full(len(norms), np.nan)
        for alike in _kinds(record.index):
            chosen = judged & alike
            if chosen.sum() < 2:
                continue
            limits[chosen] = self.ratio * norms[chosen].max()
            low = chosen & (norms < limits) & (norms > 0)
            fires |= low & (record.index.depth < record.index.depth[chosen & ~low].min())
        text = f"gradient norm {{value:.3g}}, 1/{1 / self.ratio:g} of the largest such layer's is {{limit:.3g}}"
        return self.over(record, fires, judged, norms, limits, text), state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        past = Progress(*state["loss"])
        if block.grad_norms is None or not block.has_finite_losses:
            return None
        norms, measured = block.grad_norms
        judged = select(block.index, self.paths, min_ndim=2) & measured & np.isfinite(norms) & ~_match(block.index)
        if (judged.sum(axis=1) < 2).any():
            return None
        largest = np.where(judged, norms, 0.0).max(axis=1, keepdims=True)
        if (judged & (norms < self.ratio * largest) & (norms > 0)).any():
            return None
        loss = progress_over(past, block.losses, block.samples)
        early = min(max(99 - past.seen, 0), len(block))
        return Passed({"loss": tuple(loss)}, len(block) - early, "the loss is not known over 100 steps" * (early > 0))


_MATCHING = re.compile(r"(^|[._])(q|k|wq|wk|query|key|to_q|to_k)(_?proj(ection)?|_?lin(ear)?)?\.weight$")
"""Names of the weights whose products attention is made of."""

_CACHE: WeakKeyDictionary[Index, Bools] = WeakKeyDictionary()


def _match(index: Index) -> Bools:
    """Return which paths are weights of queries or keys."""
    if index not in _CACHE:
        _CACHE[index] = np.array([bool(_MATCHING.search(path)) for path in index.paths], np.bool_)
    return _CACHE[index]


def _kinds(index: Index) -> list[Bools]:
    """Return, for each type of layer, which paths are of it."""
    types = np.array(index.types)
    return [types == kind for kind in sorted(set(index.types))]


class Dead(Rule):
    """Flags weights without any gradient (exactly zero, or none), while the loss does not improve.

    Weights of two or more dimensions. A branch that is not used (an expert that gets no token, a head for another
    task) has no gradient and is healthy, so it takes either the whole beginning of the model, in forward order (a
    trunk that gets nothing), or at least `share` of the weights. Without a loss the trunk alone counts. Weights of
    modules that did not run when outputs were last sampled are not judged: a head that waits its turn.

    Args:
        share: of the weights that may not be without gradient. In (0, 1].
        stuck: share of its first level by which the loss must have fallen to be improving.
        min_loss: a loss of at most this size needs no gradient.
    """

    share: float = 0.5
    stuck: float = 0.3
    min_loss: float = 1e-4
    severity: str = "critical"
    for_steps: int = 20
    advice: str = (
        "Usually units that died (ReLU with a large bias or learning rate), a `.detach()` or `no_grad` that cuts the "
        "graph, a softmax over one unit, or an input of zeros. Check that the loss depends on these weights; lower "
        "the learning rate; use leaky ReLU or He initialisation."
    )

    enough = 20
    needs = frozenset({"grad_norm", "loss"})
    order = "backward"
    low_is_worse = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("share", 0 < self.share <= 1, "0 and at most 1", "above")
        self._require("stuck", self.stuck > 0, 0, "above")

    def init(self) -> State:
        return {"loss": Progress(), "per_path": {}}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        loss = progress(Progress(*state["loss"]), record.loss, record.num_samples)
        idle = state["per_path"].get("idle", np.zeros(len(record.index), np.bool_))
        if "output_std" in record.columns:
            idle = _idle(record)
        state = {"loss": tuple(loss), "per_path": {"idle": idle}}
        if "grad_norm" not in record.columns:
            return self.unjudged(record, "no gradient was measured"), state
        norms, measured = record.columns["grad_norm"], record.measured("grad_norm")
        has_grad = measured & (norms != 0)
        weights = select(record.index, self.paths, min_ndim=2) & record.accounted & (has_grad | ~idle)
        if "optimizer" in record.scalars:
            # Optimizers that take turns: the others' parameters have no gradient now.
            weights = weights & measured
        if not measured.any() or not weights.any():
            return self.unjudged(record, "no weight has a gradient"), state
        if loss.seen and (not loss.is_stuck(self.stuck, after=20) or abs(loss.now) <= self.min_loss):
            return self.clear(record), state
        dead = weights & ~has_grad
        if not dead.any():
            return self.clear(record), state
        trunk = dead & (record.index.depth < self._first_alive(record, weights & ~dead))
        many = bool(loss.seen) and dead.sum() >= self.share * weights.sum()
        fires = dead if many else trunk
        return self.over(record, fires, weights, np.where(measured, norms, 0.0), 0.0, "no gradient at all"), state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        weights = select(block.index, self.paths, min_ndim=2)
        if block.grad_norms is None or block.has_any({"optimizer", "output_std"}) or not weights.any():
            return None
        norms, measured = block.grad_norms
        if not (measured & (norms != 0))[:, weights].all():
            return None
        loss = tuple(progress_over(Progress(*state["loss"]), block.losses, block.samples))
        return Passed({**state, "loss": loss}, len(block))

    @staticmethod
    def _first_alive(record: StepRecord, alive: Bools) -> int:
        depth = record.index.depth
        return int(depth[alive].min()) if alive.any() else int(depth.max()) + 1


def _idle(record: StepRecord) -> Bools:
    """Return which parameters' modules did not run, at a step at which outputs were sampled."""
    index, ran = record.index, record.measured("output_std")
    owners = [index.positions.get(path.rpartition(".")[0], -1) for path in index.paths]
    return np.array([p >= 0 and not ran[p] for p in owners]) & index.is_parameter
