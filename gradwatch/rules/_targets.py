"""What outputs, targets and inputs must have to do with each other. Runs where the batch is given."""

from __future__ import annotations

import math

from ..records import Index, StepRecord
from ._block import Block, Passed
from ._findings import Findings
from ._rule import Rule, State

__all__ = ["ConstantLabels", "OutputRange", "TargetSemantics", "UnnormalisedInput"]

_RANGES = {
    "Sigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Hardsigmoid": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
    "Hardtanh": (-1.0, 1.0),
    "ReLU": (0.0, math.inf),
    "Softplus": (0.0, math.inf),
    "LogSoftmax": (-math.inf, 0.0),
}


class OutputRange(Rule):
    """Flags outputs that can't reach the targets: the last activation's range leaves targets out, or every output lies
    beyond every target; and targets beyond 0 to 1 under a binary cross-entropy, which then has no least value.

    Scores of classes that a last ReLU cuts off at zero count too. The range is that of the last module in forward
    order, where outputs keep to it, or else of outputs that press against 0, 1 or -1. Targets must lie outside by more
    than 2 % of their own range. Class indices have no range, and targets of 0 and 1 alone may stand against logits.

    Args:
        margin: share of the targets' range that may lie outside.
        settle: steps after which outputs that all lie beyond the targets are flagged.
    """

    margin: float = 0.02
    settle: int = 50
    severity: str = "critical"
    for_steps: int = 4
    advice: str = (
        "The last activation (or the loss) does not fit the targets: no activation for regression, sigmoid for 0..1, "
        "tanh for -1..1; or scale the targets to zero mean and unit deviation; check that the loss compares values."
    )

    is_core = False
    needs = frozenset({"output_min", "output_max", "target_min", "target_max", "target_is_integer", "loss_of_shares"})
    awaits = frozenset({"output_min", "target_min"})

    def init(self) -> State:
        return {"out": None, "target": None, "binary": True, "seen": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if _is_cut(record):
            text = "the last module is a ReLU: scores of classes are cut off at zero"
            return self.whole(record, True, 0.0, 0.0, text), state
        outside = _beyond_shares(record)
        if outside is not None:
            return self.whole(record, True, outside[1], 1.0, _SHARES.format(*outside)), state
        found = _ranges(record)
        if found is None:
            return self.unjudged(record, "outputs or targets are not known, or targets are classes"), state
        low, high, target_low, target_high = found
        out = _union(state["out"], (low, high))
        target = _union(state["target"], (target_low, target_high))
        binary = state["binary"] and {target_low, target_high} <= {0.0, 1.0}
        state = {"out": out, "target": target, "binary": binary, "seen": state["seen"] + 1}
        width = max(target[1] - target[0], 1e-12)
        slack = self.margin * width
        bound_low, bound_high = _bounds(record.index, out)
        if target[1] > bound_high + slack:
            text = f"outputs end at {bound_high:g}, targets reach {{value:.4g}}"
            return self.whole(record, True, target[1], bound_high, text), state
        if target[0] < bound_low - slack:
            text = f"outputs begin at {bound_low:g}, targets at {{value:.4g}}"
            return self.whole(record, True, target[0], bound_low, text), state
        late = record.step >= self.settle and not binary
        beyond = low > target[1] + slack or high < target[0] - slack
        text = f"outputs {low:.4g} to {high:.4g}, targets {target[0]:.4g} to {target[1]:.4g}"
        if record.loss < _FAR_BELOW:
            text += f"; the loss is {record.loss:.3g}: check the sign of its terms"
        return self.whole(record, late and beyond, low, target[1], text), state


_SHARES = "targets are {:g} to {:g}, and the binary cross-entropy takes 0 to 1: scale them into that range"


def _beyond_shares(record: StepRecord) -> tuple[float, float] | None:
    """Return the range of targets that a binary cross-entropy can't be meant for; None where there is no such thing."""
    low, high = (record.scalars.get(f"target_{end}", math.nan) for end in ("min", "max"))
    of_shares = record.scalars.get("loss_of_shares", 0.0) > 0
    return (low, high) if of_shares and (low < -_ROUNDING or high > 1 + _ROUNDING) else None


_ROUNDING = 1e-3
_FAR_BELOW = -10.0
"""A loss that few objectives reach with the right sign."""


def _has_one_label(record: StepRecord) -> bool:
    """Return whether each target is a row of shares that sum to 1."""
    scalars = record.scalars
    sums = scalars.get("target_row_sum_min", math.nan), scalars.get("target_row_sum_max", math.nan)
    return abs(sums[0] - 1) < 1e-3 and abs(sums[1] - 1) < 1e-3 and scalars.get("target_min", -1) >= 0


def _is_cut(record: StepRecord) -> bool:
    """Return whether class scores come out of a ReLU."""
    scalars = record.scalars
    classes = scalars.get("num_classes", 0.0) > 1 or _has_one_label(record)
    return classes and scalars.get("output_min", math.nan) == 0 and _last_types(record.index) == {"ReLU"}


def _last_types(index: Index) -> set[str]:
    """Return the types of the modules that come last in forward order."""
    modules = index.is_module
    if not modules.any():
        return set()
    last = int(index.depth[modules].max())
    return {t for t, d, m in zip(index.types, index.depth.tolist(), modules.tolist(), strict=True) if m and d == last}


def _ranges(record: StepRecord) -> tuple[float, float, float, float] | None:
    scalars = record.scalars
    names = ("output_min", "output_max", "target_min", "target_max")
    low, high, target_low, target_high = (scalars.get(n, math.nan) for n in names)
    finite = all(map(math.isfinite, (low, high, target_low, target_high)))
    # Labels as bool, or one class against many logits, are compared by another measure than distance.
    return (low, high, target_low, target_high) if finite and not scalars.get("target_is_integer", 0.0) > 0 else None


def _union(past: tuple[float, float] | None, now: tuple[float, float]) -> tuple[float, float]:
    return now if past is None else (min(past[0], now[0]), max(past[1], now[1]))


def _bounds(index: Index, out: tuple[float, float]) -> tuple[float, float]:
    """Return the range that outputs can't leave, as far as can be told."""
    for name in _last_types(index) & set(_RANGES):
        low, high = _RANGES[name]
        if low - 1e-6 <= out[0] and out[1] <= high + 1e-6:
            return low, high
    if out[0] >= 0 and out[1] <= 1 and out[1] > 0.98 and out[0] < 0.02:
        return 0.0, 1.0
    if out[0] >= -1 and out[1] <= 1 and out[0] < -0.98 and out[1] > 0.98:
        return -1.0, 1.0
    # Exactly zero, again and again, is the corner of a ReLU, unless nothing else ever comes out.
    return (0.0, math.inf) if out[0] == 0 < out[1] else (-math.inf, math.inf)


class TargetSemantics(Rule):
    """Flags predictions and targets that don't speak of the same thing.

    Shapes that differ and broadcast in the loss; outputs whose rows sum to 1 (a softmax) against targets whose rows do
    not.
    """

    severity: str = "critical"
    for_steps: int = 2
    advice: str = (
        "Give prediction and target the same shape (`squeeze`, `unsqueeze`). Where a sample has several labels, give "
        "`binary_cross_entropy_with_logits` the logits, not a softmax's outputs: each unit needs a sigmoid of its own."
    )

    is_core = False
    needs = frozenset(
        {"shape_mismatch", "output_row_sum_min", "output_row_sum_max", "target_row_sum_min", "target_row_sum_max"}
    )
    awaits = frozenset({"output_min", "target_min"})

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        scalars = record.scalars
        if "output_min" not in scalars or "target_min" not in scalars:
            return self.unjudged(record, "outputs or targets are not known"), state
        if scalars.get("shape_mismatch", 0.0) > 0:
            text = "prediction and target have different shapes, and the loss broadcasts them"
            return self.whole(record, True, 1.0, 0.0, text), state
        sums = [
            scalars.get(f"{side}_row_sum_{end}", math.nan) for side in ("output", "target") for end in ("min", "max")
        ]
        softmax = abs(sums[0] - 1) < 1e-3 and abs(sums[1] - 1) < 1e-3 and scalars["output_min"] >= 0
        one_label = abs(sums[2] - 1) < 1e-3 and abs(sums[3] - 1) < 1e-3
        wrong = softmax and not one_label and all(map(math.isfinite, sums))
        text = f"rows of the output sum to 1, those of the targets to {sums[2]:.3g} .. {sums[3]:.3g}"
        return self.whole(record, wrong, sums[3], 1.0, text), state


class _FirstBatches(Rule):
    """Judges the first batches alone; then says nothing more."""

    batches: int = 10

    is_core = False

    def init(self) -> State:
        return {"seen": 0, "bad": 0, "samples": 0.0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if state["seen"] >= self.batches:
            return self.unjudged(record, f"judged on the first {self.batches} batches"), state
        bad, value, limit, text = self._look(record)
        if bad is None:
            return self.unjudged(record, "the batch was not given"), state
        samples = state["samples"] + _samples(record)
        state = {"seen": state["seen"] + 1, "bad": state["bad"] + bad, "samples": samples}
        # All so far, and three at least: one batch may be odd.
        fires = state["bad"] == state["seen"] >= min(3, self.batches)
        fires = fires and (samples >= self._least_samples or state["seen"] >= self.batches)
        return self.whole(record, fires, value, limit, text), state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if state["seen"] >= self.batches:
            return Passed(state, 0, f"judged on the first {self.batches} batches")
        return super().pass_over(block, state)

    @property
    def _least_samples(self) -> int:
        return 0

    def _look(self, record: StepRecord) -> tuple[bool | None, float, float, str]:
        raise NotImplementedError


def _samples(record: StepRecord) -> float:
    """Return how many samples the batch held: where its inputs are tokens, no size of theirs is on record."""
    return record.num_samples or record.scalars.get("batch_size", 0.0)


class UnnormalisedInput(_FirstBatches):
    """Flags inputs far from unit size: |mean| or standard deviation above `size`, or no entry above `tiny`.

    The first layer's gradient grows with its inputs: large ones make it diverge, tiny ones keep it from learning.
    Floating-point inputs alone, and not where the first layer normalises them or looks them up.

    Args:
        size: of mean or standard deviation.
        tiny: largest entry that is too little, unless it is 0.
        batches: looked at.
    """

    size: float = 20.0
    tiny: float = 0.01
    batches: int = 10
    advice: str = (
        "Subtract the mean and divide by the standard deviation of the training set (images: divide by 255). Gradients "
        "grow with the inputs: where these are to stay as they are, lower the learning rate."
    )

    needs = awaits = frozenset({"input_mean", "input_std", "input_absmax"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("size", self.size > 0, 0, "above")

    def _look(self, record: StepRecord) -> tuple[bool | None, float, float, str]:
        mean, std = (record.scalars.get(n, math.nan) for n in ("input_mean", "input_std"))
        if not (math.isfinite(mean) and math.isfinite(std)):
            return None, math.nan, self.size, ""
        first = _first_type(record.index)
        fits = not ("Norm" in first or "Embedding" in first)
        value = max(abs(mean), std)
        largest = record.scalars.get("input_absmax", math.nan)
        if fits and 0 < largest < self.tiny:
            return True, largest, self.tiny, "the largest input is {value:.2g}"
        return fits and value > self.size, value, self.size, f"inputs have mean {mean:.3g} and deviation {std:.3g}"


def _first_type(index: Index) -> str:
    parameters = index.is_parameter
    if not parameters.any():
        return ""
    first = int(index.depth[parameters].min())
    places = [i for i, d in enumerate(index.depth.tolist()) if d == first and index.kinds[i] == "parameter"]
    return index.types[places[0]] if places else ""


class ConstantLabels(_FirstBatches):
    """Flags batches whose targets are all the same: one class alone, or one number.

    Args:
        batches: looked at; each must have eight samples or more, and all together 256, or else all ten are needed:
            where one class is rare, a few batches without it are no fault. Targets that no batch holds, but only the
            loss (the ones that a generator is to be taken for, the first place of a contrastive loss), are alike by
            right.
    """

    batches: int = 10
    advice: str = "Labels were lost on the way (an integer division, a wrong column, a loader that does not shuffle)."

    needs = frozenset(
        {
            "target_min",
            "target_max",
            "targets_of_loss",
            "target_entropy",
            "target_row_sum_min",
            "target_variance",
            "batch_size",
        }
    )
    awaits = frozenset({"target_min", "target_max"})

    @property
    def _least_samples(self) -> int:
        return 256

    def _look(self, record: StepRecord) -> tuple[bool | None, float, float, str]:
        scalars = record.scalars
        entropy = scalars.get("target_entropy", math.nan)
        low, high = scalars.get("target_min", math.nan), scalars.get("target_max", math.nan)
        if scalars.get("targets_of_loss", 0.0) > 0:
            return None, math.nan, 0.0, ""
        if not (math.isfinite(low) and math.isfinite(high)) or _samples(record) < 8:
            return None, math.nan, 0.0, ""
        of_classes = scalars.get("target_is_integer", 0.0) > 0 or _has_one_label(record)
        constant = entropy < 1e-9 if of_classes and math.isfinite(entropy) else low == high
        # Rows of zeros with a one are alike when no column varies.
        constant = constant or scalars.get("target_variance", math.nan) == 0
        return constant, 0.0, 0.0, f"all targets of the batch are alike (from {low:.4g} to {high:.4g})"
