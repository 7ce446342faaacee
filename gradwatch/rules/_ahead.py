"""What goes before the loss does."""

from __future__ import annotations

import math
import re

import numpy as np

from ..records import MODULE, Bools, Index, StepRecord
from ._findings import Findings
from ._rule import Rule, State
from ._selection import select
from ._windows import median, push

__all__ = ["DormantUnitsGrowing", "ResidualGrowing", "StepsTooLong"]

_UNITS = ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "RReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish", "Softplus")
_ACTIVATIONS = frozenset((*_UNITS, "Hardswish", "Hardshrink", "Softshrink"))
_KEPT = 5
"""Losses of a level."""
_MEMBER = re.compile(r"(?:^|\.)\d+$")


class StepsTooLong(Rule):
    """Flags steps that end uphill: at its end the loss rises along it, by more than `share` of itself on average.

    A step ends where the next batch's gradient is taken, so that the noise of its own batch is not in that gradient:
    gradient times step is the slope which the step ends on. Below 0 there is still something to gain in its direction,
    above 0 it went beyond the lowest point, and what it loses there the next ones win back. The larger that share, the
    nearer the point at which they no longer do; 0.07 over 30 steps, were it not won back, would come to eight times the
    loss.

    Left alone is a loss that falls, to `falls` of itself within the window: momentum swings at first. Not judged where
    the loss has been 0 or below (it has no level then), nor where it has fallen below `gone` of its highest level.

    Args:
        share: of the loss.
        window: steps that are averaged.
        falls: of the losses' mean over the first half of the window, that of the second half.
        gone: share of the highest level, below which hardly a loss is left.
    """

    share: float = 0.07
    window: int = 30
    falls: float = 0.8
    gone: float = 1e-3
    for_steps: int = 3
    warmup: int = 60
    advice: str = (
        "Each step goes beyond the lowest point in its direction and climbs: the learning rate is too large for this "
        "curvature and this noise. Halve it, or take larger batches; under momentum and Adam lower beta1, too."
    )

    is_core = False
    needs = frozenset({"slope_after_step", "loss"})
    awaits = frozenset({"slope_after_step"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("share", self.share > 0, 0, "above")
        self._require("window", self.window >= 2, 2)
        self._require("falls", 0 <= self.falls < 1, "0 and below 1")
        self._require("gone", 0 <= self.gone < 1, "0 and below 1")

    def init(self) -> State:
        return {"slopes": (), "losses": (), "highest": 0.0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        slope = record.scalars.get("slope_after_step", math.nan)
        if not math.isfinite(slope) or not math.isfinite(record.loss):
            return self.unjudged(record, "no finite loss, or no slope after the step, was measured"), state
        slopes = push(state["slopes"], slope, self.window)
        losses = push(state["losses"], record.loss, self.window)
        state = {**state, "slopes": slopes, "losses": losses}
        if len(slopes) < self.window:
            return self.unjudged(record, f"fewer than {self.window} steps were measured"), state
        if min(losses) <= 0:
            return self.unjudged(record, "a loss that goes below 0 has no level"), state
        # The mean: of a loss that falls fast, slopes and losses are then those of the same steps.
        level = float(np.mean(losses))
        state["highest"] = highest = max(state["highest"], level)
        value = float(np.mean(slopes)) / level
        half = self.window // 2
        is_falling = np.mean(losses[half:]) < self.falls * np.mean(losses[:half])
        over = value > self.share and level > self.gone * highest and not is_falling
        text = "steps end on a slope of {value:.2g} of the loss each, limit {limit:.2g}"
        return self.whole(record, bool(over), value, self.share, text), state


class DormantUnitsGrowing(Rule):
    """Flags activations of which ever more units are dormant, while the loss is worse than it has been.

    Dormant are units whose mean magnitude over a batch is next to nothing beside that of the others. Their share is
    above `many`, by more than `more` above the lowest that it had, and the loss is above its lowest level: a network
    that learns may do without some of its units, one that has lost them learns what is new less well.

    Source: Sokar et al., "The Dormant Neuron Phenomenon in Deep Reinforcement Learning", ICML 2023, arXiv 2302.12902.

    Args:
        many: share of a module's units.
        more: by which it has grown.
        worse: share of the lowest loss by which it is above that.
    """

    many: float = 0.3
    more: float = 0.2
    worse: float = 0.1
    for_steps: int = 2
    advice: str = (
        "Units go silent that do not come back: lower the learning rate, use leaky ReLU or layer normalisation, decay "
        "the weights towards where they began, or initialise dormant units again (ReDo)."
    )

    is_core = False
    needs = frozenset({"dormant_fraction", "loss"})
    awaits = frozenset({"dormant_fraction"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("many", 0 < self.many < 1, "0 and below 1", "above")
        self._require("more", self.more > 0, 0, "above")
        self._require("worse", self.worse >= 0, 0)

    def init(self) -> State:
        return {"per_path": {}, "losses": (), "best": math.inf}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if "dormant_fraction" not in record.columns:
            return self.unjudged(record, "no units were measured"), state
        losses = push(state["losses"], record.loss, _KEPT)
        if not losses:
            return self.unjudged(record, "no loss is known"), state
        loss, shares = median(losses), record.columns["dormant_fraction"]
        best = min(state["best"], loss)
        judged = select(record.index, self.paths, "module") & record.measured("dormant_fraction")
        judged &= np.array([kind in _ACTIVATIONS for kind in record.index.types])
        lowest = np.fmin(
            state["per_path"].get("lowest", np.full(len(shares), np.nan)), np.where(judged, shares, np.nan)
        )
        with np.errstate(invalid="ignore"):
            true = judged & (shares > self.many) & (shares > lowest + self.more)
        true &= loss > best + self.worse * abs(best)
        state = {"per_path": {"lowest": lowest}, "losses": losses, "best": best}
        text = f"{{value:.0%}} of its units are dormant, limit {{limit:.0%}}; the loss is {loss:.3g}, it was {best:.3g}"
        return self.over(record, true, judged, shares, np.maximum(self.many, lowest + self.more), text), state


class ResidualGrowing(Rule):
    """Flags blocks whose output has grown to more than `times` what it was when the loss was lowest.

    Blocks are modules with modules of their own, three or more of one class in one list: what goes through them is the
    residual stream. It grows in every training, as long as that pays; growth without a gain is what goes before a loss
    that diverges, and in half precision before one that is not finite.

    Source: growing activations of late blocks as what instabilities begin with: Wortsman et al., "Small-scale proxies
    for large-scale Transformer training instabilities", arXiv 2309.14322; Takase et al., "Spike No More", arXiv
    2312.16903.

    Args:
        times: its root mean square has grown.
    """

    times: float = 3.0
    for_steps: int = 2
    advice: str = (
        "Nothing holds the residual stream: lower the learning rate or lengthen its warm-up, scale the last layer of "
        "each branch by one over the root of the depth, normalise what a branch adds, add weight decay."
    )

    is_core = False
    needs = frozenset({"output_rms", "loss"})
    awaits = frozenset({"output_rms"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("times", self.times > 1, 1, "above")

    def init(self) -> State:
        return {"per_path": {}, "losses": (), "best": math.inf}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if "output_rms" not in record.columns:
            return self.unjudged(record, "no activations were measured"), state
        losses = push(state["losses"], record.loss, _KEPT)
        sizes = record.columns["output_rms"]
        judged = select(record.index, self.paths, "module") & record.measured("output_rms") & blocks(record.index)
        if not losses or not judged.any():
            return self.unjudged(record, "no loss is known, or there are no blocks"), state
        loss, held = median(losses), state["per_path"].get("at_best", np.full(len(sizes), np.nan))
        # A level of less than all the losses is that of a lucky batch.
        if loss <= state["best"] or len(losses) < _KEPT:
            best, held = loss, np.where(judged, sizes, held)
        else:
            best = state["best"]
        with np.errstate(invalid="ignore"):
            true = judged & (sizes > self.times * held)
        state = {"per_path": {"at_best": held}, "losses": losses, "best": best}
        text = f"rms of its output {{value:.3g}}, {self.times:g} times what it was at the lowest loss is {{limit:.3g}}"
        return self.over(record, true, judged, sizes, self.times * held, text), state


def blocks(index: Index) -> Bools:
    """Return which paths are blocks: of three or more of one class, with modules of their own, in one list."""
    owners = {path.rpartition(".")[0] for path, kind in zip(index.paths, index.kinds, strict=True) if kind == MODULE}
    kinds: dict[tuple[str, str], int] = {}
    lists = [
        (path.rpartition(".")[0], kind) if _MEMBER.search(path) and path in owners else None
        for path, kind in zip(index.paths, index.types, strict=True)
    ]
    for found in lists:
        if found is not None:
            kinds[found] = kinds.get(found, 0) + 1
    return np.array([found is not None and kinds[found] >= 3 for found in lists], bool)
