"""Units: silent, saturated, out of scale, or all alike."""

from __future__ import annotations

import numpy as np

from ..records import StepRecord
from ._block import Block, Passed
from ._findings import Findings
from ._rule import Rule, State
from ._selection import select
from ._windows import Progress, progress, progress_over

__all__ = ["ActScale", "DeadUnits", "Saturated", "SymmetricUnits"]


class _Share(Rule):
    """Judges a share of a module's units once the loss is known over 100 steps."""

    is_core = False
    needs = frozenset({"loss"})

    def init(self) -> State:
        return {"loss": Progress(), "per_path": {}}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        loss = progress(Progress(*state["loss"]), record.loss, record.num_samples)
        state = {**state, "loss": tuple(loss)}
        column, text = self._column
        if column not in record.columns:
            return self.unjudged(record, f"`{column}` was not measured"), state
        if loss.seen < 100:
            return self.unjudged(record, "the loss is not known over 100 steps"), state
        shares = record.columns[column]
        judged = select(record.index, self.paths, "module") & record.measured(column)
        once, twice = self._limits(loss)
        before = state["per_path"].get("share", np.zeros(len(shares)))
        with np.errstate(invalid="ignore"):
            true = judged & ((shares > once) | ((shares > twice) & (before > twice)))
        state = {**state, "per_path": {"share": np.where(judged, shares, before)}}
        return self.over(record, true, judged, shares, twice, text), state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        column, _ = self._column
        if column in block.names:
            return None
        loss = progress_over(Progress(*state["loss"]), block.losses, block.samples)
        return Passed({**state, "loss": tuple(loss)}, 0, f"`{column}` was not measured")

    @property
    def _column(self) -> tuple[str, str]:
        raise NotImplementedError

    def _limits(self, loss: Progress) -> tuple[float, float]:
        """Return the share that is too much at one measurement, and at two running."""
        raise NotImplementedError


class DeadUnits(_Share):
    """Flags layers most of whose units are silent for every sample of a window, while the loss is not getting better.

    A unit counts as silent when it was zero for all of at least 256 samples (over whole windows: one batch shows a
    third of healthy units silent). More than `most` of the units once, with a loss that fell by less than 60 %; or more
    than `many` at two measurements running (narrow layers have so many now and then), with one that fell by less than
    `stuck`.

    Source: L. Lu et al., "Dying ReLU and initialization", arXiv 1903.06733.

    Args:
        most, many: shares of silent units.
        stuck: share of its first level by which the loss must have fallen to be improving.
    """

    most: float = 0.9
    many: float = 0.5
    stuck: float = 0.3
    advice: str = (
        "Units died: the learning rate is too high, biases are far below zero, or inputs are not normalised. Lower the "
        "learning rate; use leaky ReLU or GELU; He initialisation; normalise inputs."
    )

    needs = frozenset({"silent_fraction", "loss"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("many", 0 < self.many <= self.most < 1, "0, at most `most`, and below 1", "above")

    @property
    def _column(self) -> tuple[str, str]:
        return "silent_fraction", "{value:.0%} of the units are silent"

    def _limits(self, loss: Progress) -> tuple[float, float]:
        most = self.most if loss.is_stuck(0.6) else 1.0
        return most, self.many if loss.is_stuck(self.stuck) else most


class Saturated(_Share):
    """Flags sigmoid and tanh layers with most of their inputs at 5 or beyond, while the loss does not improve.

    Source: X. Glorot, Y. Bengio, AISTATS 2010.

    Args:
        share: of the inputs.
        stuck: share of its first level by which the loss must have fallen to be improving.
    """

    share: float = 0.5
    stuck: float = 0.5
    for_steps: int = 50
    advice: str = (
        "Inputs or weights are too large for the activation. Normalise inputs; start the weights smaller (Xavier); "
        "lower the learning rate; add normalisation before the activation."
    )

    needs = frozenset({"saturated_fraction", "loss"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("share", 0 < self.share < 1, "0 and below 1", "above")

    @property
    def _column(self) -> tuple[str, str]:
        return "saturated_fraction", "{value:.0%} of the inputs are saturated"

    def _limits(self, loss: Progress) -> tuple[float, float]:
        share = self.share if loss.is_stuck(self.stuck) else 1.0
        return share, share


class ActScale(Rule):
    """Notes modules whose outputs have a standard deviation far from one.

    Args:
        low, high: bounds of the standard deviation.
    """

    low: float = 1e-3
    high: float = 1e3
    severity: str = "info"
    for_steps: int = 50
    advice: str = "Outputs shrink or grow with depth. Use He or Xavier initialisation, normalisation, scaled residuals."

    is_core = False
    needs = awaits = frozenset({"output_std"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("low", 0 <= self.low < self.high, f"{self.high} (`high`)", "at least 0 and below")

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if "output_std" not in record.columns:
            return self.unjudged(record, "outputs were not measured"), state
        std = record.columns["output_std"]
        judged = select(record.index, self.paths, "module") & record.measured("output_std") & np.isfinite(std)
        # Exactly zero is a matter of one value, or of dead units.
        true = judged & (((std < self.low) & (std > 0)) | (std > self.high))
        limit = np.where(std > self.high, self.high, self.low)
        return self.over(record, true, judged, std, limit, "standard deviation of the output {value:.2g}"), state


class SymmetricUnits(Rule):
    """Flags a model whose units begin as copies of each other, and stay so.

    All rows of a weight are equal (their spread is below `spread` of the largest entry). One such layer is put right by
    its random neighbours; weights of zero (residual branches, adapters) are meant. So it takes at least two weights,
    and half of those that have several rows.

    Source: I. Goodfellow et al., "Deep Learning", 2016, section 8.4 (symmetry breaking).

    Args:
        spread: of a column over the rows, as a share of the largest entry.
    """

    spread: float = 1e-6
    severity: str = "critical"
    advice: str = "Start the weights at random (He or Xavier); constants make all units of a layer learn the same."

    is_core = False
    needs = frozenset({"row_spread", "param_norm"})
    awaits = frozenset({"row_spread"})
    low_is_worse = True

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if "row_spread" not in record.columns or "param_norm" not in record.columns:
            return self.unjudged(record, "judged at the first step only"), state
        spread = record.columns["row_spread"]
        judged = select(record.index, self.paths, min_ndim=2) & record.measured("row_spread") & np.isfinite(spread)
        alike = judged & (spread < self.spread) & (record.columns["param_norm"] > 0)
        enough = alike.sum() >= max(2, judged.sum() / 2)
        true = alike if enough else np.zeros_like(alike)
        return self.over(record, true, judged, spread, self.spread, "all rows of the weight are equal"), state
