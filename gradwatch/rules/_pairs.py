"""Inputs, targets, outputs and the loss set side by side: what should be predicted, and what is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..records import StepRecord
from ._block import Block, Passed
from ._company import COMPANY, has_company
from ._findings import Findings
from ._reductions import FORMULAS, reductions
from ._rule import Rule, State
from ._windows import Progress, progress, progress_over

__all__ = ["LeakedTargets", "LossTerms", "TargetsShifted", "TooGood", "WholeTargets", "WrongObjective"]

_PLACES = {-1: "target_at_minus_1", 0: "target_at_0", 1: "target_at_1", 2: "target_at_2"}
_ENTROPIES = ("cross_entropy", "cross_entropy_shifted")
_SAID = {
    -1: "the token before each one is to be predicted, which the model has already seen",
    0: "the input itself is to be predicted: targets are not shifted, and copying is all there is to learn",
    2: "the token after the next is to be predicted: targets are shifted by two, twice instead of once",
    3: "targets are shifted by three places",
}


class TargetsShifted(Rule):
    """Flags a language model whose targets are the tokens of its input at another place than the next one.

    Targets are compared with the input, token by token, and the loss with the cross-entropy at the same place and at
    the next one: Hugging Face's causal models are given the tokens themselves and shift them inside. Before much is
    learned the two are nearly equal, and a trainer may divide by the targets of all places: the loss must follow its
    own more closely, from batch to batch and up to a constant factor, than the other.

    Args:
        batches: running that must agree.
    """

    batches: int = 3
    severity: str = "critical"
    advice: str = (
        "Targets do not match the inputs: predict the next token, `logits[:, :-1]` against `tokens[:, 1:]`, and shift "
        "once: not in the data set and in the model. A loss that is too good is a leak of what is to be predicted."
    )

    is_core = False
    needs = frozenset({"loss", "cross_entropy", "cross_entropy_shifted", *_PLACES.values()})
    awaits = frozenset(_PLACES.values())

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("batches", self.batches >= 1, 1)

    def init(self) -> State:
        return {"place": None, "running": 0, "ratios": ()}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        shares = {place: record.scalars.get(name, math.nan) for place, name in _PLACES.items()}
        found = [place for place, share in shares.items() if share >= 0.95]
        others = [share for place, share in shares.items() if place not in found]
        # Where every token is like its neighbours nothing can be told.
        if len(found) != 1 or not all(share < 0.8 for share in others):
            return self.unjudged(record, "targets are not the tokens of the input"), state
        follows = [k for k, name in enumerate(_ENTROPIES) if _follows(record, name)]
        if len(follows) != 1:
            return self.unjudged(record, "the loss is no cross-entropy of these outputs"), state
        place = found[0] + follows[0]
        goes_on = place == state["place"]
        running = state["running"] + 1 if goes_on else 1
        before = state.get("ratios", ()) if goes_on else ()
        ratios = (*before, _ratios(record))[-self.batches :]
        fires = place != 1 and running >= self.batches and _is_closer(ratios, follows[0])
        text = _SAID.get(place, "")
        after = {"place": place, "running": running, "ratios": ratios}
        return self.whole(record, fires, float(place), 1.0, text), after


def _follows(record: StepRecord, name: str) -> bool:
    value = record.scalars.get(name, math.nan)
    return abs(record.loss - value) <= 0.01 * abs(value)


def _ratios(record: StepRecord) -> tuple[float, float]:
    """Return the loss over the cross-entropy at the same place, and over that at the next one."""
    same, following = (record.scalars.get(name) or math.nan for name in _ENTROPIES)
    return record.loss / same, record.loss / following


def _is_closer(ratios: Sequence[tuple[float, float]], followed: int) -> bool:
    """Return whether the loss is the one that it follows, or stays nearer to a multiple of it than of the other."""
    own, others = [pair[followed] for pair in ratios], [pair[1 - followed] for pair in ratios]
    is_the_same = max(abs(ratio - 1) for ratio in own) <= 1e-4
    return is_the_same or len(ratios) == 1 or max(own) - min(own) < max(others) - min(others)


class TooGood(Rule):
    """Flags a model of sequences that knows nearly all of what it is to predict within its first steps.

    Its cross-entropy began at that of a guess, and is below `share` of the best constant's at two batches measured
    running, within the first `losses` losses: nothing but a copy is learned as fast.

    Args:
        share: of the best constant's cross-entropy.
        losses: within which it is too good.
    """

    share: float = 0.01
    losses: int = 64
    advice: str = (
        "It is too good: what is to be predicted leaks into the inputs. A decoder is given its targets without a "
        "shift, a mask is missing, or the label is a column of the input; or it is the same batch at every step."
    )

    is_core = False
    needs = frozenset({"loss", "cross_entropy", "cross_entropy_shifted", "baseline_loss"})
    awaits = frozenset({"cross_entropy_shifted"})
    low_is_worse = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("share", 0 < self.share < 1, "0 and below 1", "above")
        self._require("losses", self.losses >= 1, 1)

    def init(self) -> State:
        return {"since": None, "first": math.nan, "running": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        value, level = (record.scalars.get(name, math.nan) for name in ("cross_entropy", "baseline_loss"))
        if "cross_entropy_shifted" not in record.scalars or not (math.isfinite(value) and level > _LEAST_LEVEL):
            return self.unjudged(record, "no sequences of classes were seen"), state
        since = record.step if state["since"] is None else state["since"]
        share = value / level
        first = share if math.isnan(state["first"]) else state["first"]
        running = state["running"] + 1 if share < self.share else 0
        state = {"since": since, "first": first, "running": running}
        fires = running >= _TWICE and record.step - since < self.losses and first > _OF_A_GUESS
        text = f"{{value:.2g}} of what a guess has ({level:.3g}) after {record.step - since} steps"
        return self.whole(record, fires, share, self.share, text), state


_LEAST_LEVEL = 0.5
"""Nats that there must be to learn."""
_OF_A_GUESS = 0.7
"""Share of a guess's loss above which nothing was known."""
_TWICE = 2


class WholeTargets(Rule):
    """Flags targets of a regression that are whole numbers on either side of zero: values that were cast to integers.

    Counts and ratings are whole, too, and never negative; classes have outputs of their own.

    Args:
        batches: running that must agree.
        width: between smallest and largest, above which rounding loses little.
    """

    batches: int = 5
    width: float = 16.0
    advice: str = (
        "Targets were cast to integers on the way (`.long()`, `astype(int)`, an integer column or array), and lost "
        "what lies behind the point. Keep them as floats until the loss; check the dtype of the labels."
    )

    is_core = False
    needs = frozenset({"target_is_whole", "target_min", "target_max", "num_classes"})
    awaits = frozenset({"target_is_whole"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("batches", self.batches >= 1, 1)

    def init(self) -> State:
        return {"seen": 0, "low": 0.0, "high": 0.0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        whole = record.scalars.get("target_is_whole", math.nan)
        if math.isnan(whole) or "num_classes" in record.scalars:
            return self.unjudged(record, "targets are no numbers to be predicted, or not known"), state
        low, high = (record.scalars.get(f"target_{end}", math.nan) for end in ("min", "max"))
        state = {
            "seen": state["seen"] + 1 if whole > 0 else 0,
            "low": min(state["low"], low),
            "high": max(state["high"], high),
        }
        low, high = state["low"], state["high"]
        # -1 and 1 are two classes for a hinge.
        values = low < 0 and high - low <= self.width and (low, high) != (-1.0, 1.0)
        text = f"every target is a whole number, from {low:g} to {high:g}"
        return self.whole(record, state["seen"] >= self.batches and values, high - low, self.width, text), state


class LeakedTargets(Rule):
    """Flags numbers to be predicted that stand in the inputs: as one of their columns, or as the end of a sequence.

    Args:
        batches: measured running in which all of them do.
    """

    batches: int = 3
    severity: str = "critical"
    advice: str = (
        "What is to be predicted leaks into the inputs: a window that reaches into the future, or a column that holds "
        "the label. Copying is all there is to learn, and it is not there when it counts: cut the window before the "
        "forecast begins, drop the column."
    )

    is_core = False
    needs = awaits = frozenset({"target_in_inputs"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("batches", self.batches >= 1, 1)

    def init(self) -> State:
        return {"running": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        value = record.scalars.get("target_in_inputs", math.nan)
        if math.isnan(value):
            return self.unjudged(record, "inputs are no rows of numbers, or targets no numbers"), state
        running = state["running"] + 1 if value > 0 else 0
        text = "in {value:.0f} batches running every target stands in the inputs, at the same place"
        return self.whole(record, running >= self.batches, float(running), 0.0, text), {"running": running}


class WrongObjective(Rule):
    """Flags a loss that goes down while outputs say no more of the classes that are their targets than a guess does.

    Outputs have as many units as there are classes, the loss is not their cross-entropy, and has fallen below `fall` of
    its first level, while the cross-entropy is above `guess` of the best constant's. Outputs between -1 and 1 are not
    judged: of cosines and the like a loss takes multiples, which alone are scores.

    Args:
        fall: share of the loss's first level.
        guess: share of the best constant's cross-entropy.
        batches: measured running that must agree.
    """

    fall: float = 0.3
    guess: float = 0.93
    batches: int = 4
    advice: str = (
        "The loss does not compare the outputs with the classes that they are scores of: a regression on the class's "
        "number, a mean or sum over the wrong dimension, a loss of something else. Give `cross_entropy` the scores, "
        "(samples, classes), and the class indices."
    )

    is_core = False
    needs = frozenset(
        {"loss", "cross_entropy", "baseline_loss", "num_classes", "output_units", "output_min", "output_max"}
        | {"target_max", *COMPANY}
    )
    awaits = frozenset({"cross_entropy", "num_classes"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("fall", 0 < self.fall < 1, "0 and below 1", "above")
        self._require("guess", 0 < self.guess <= 1, "0 and at most 1", "above")
        self._require("batches", self.batches >= 1, 1)

    def init(self) -> State:
        return {"loss": Progress(), "running": 0, "largest": 0.0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        loss = progress(Progress(*state["loss"]), record.loss, record.num_samples)
        state = {**state, "loss": tuple(loss)}
        value, level, classes, units, largest = (
            record.scalars.get(name, math.nan)
            for name in ("cross_entropy", "baseline_loss", "num_classes", "output_units", "target_max")
        )
        ends = (record.scalars.get(f"output_{end}", math.nan) for end in ("min", "max"))
        are_scores = classes == units and any(abs(end) > 1 for end in ends)
        if not (level > _LEAST_LEVEL and value < math.inf and are_scores) or has_company(record):
            return self.unjudged(record, "outputs are no scores of classes, or these are not known"), state
        state = {**state, "largest": max(state["largest"], largest)}
        follows = min(abs(record.loss - scale * value) for scale in reductions(record).values()) < 0.2 * record.loss
        guessing = value > self.guess * level and not follows
        state = {**state, "running": state["running"] + 1 if guessing else 0}
        # Labels that leave the last units out may have nothing to do with them: embeddings, reconstructions.
        fires = state["running"] >= self.batches and state["largest"] == classes - 1 and _has_fallen(loss, self.fall)
        text = (
            f"the loss has fallen to {loss.now / loss.start if loss.start else 0:.2g} of its first level, and the "
            f"cross-entropy of outputs and classes is {{value:.4g}}, where a guess has {level:.4g}"
        )
        return self.whole(record, fires, value, self.guess * level, text), state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if block.has_any(self.awaits):
            return None
        loss = tuple(progress_over(Progress(*state["loss"]), block.losses, block.samples))
        return Passed({**state, "loss": loss}, 0, "outputs are no scores of classes, or these are not known")


def _has_fallen(loss: Progress, share: float) -> bool:
    return loss.seen >= 100 and 0 < loss.now < share * loss.start


class LossTerms(Rule):
    """Flags a loss of which the prediction's own error is next to nothing, while it is still large by itself.

    What is left is a penalty, a balancing or a regularising term, or a KL divergence: the optimizer minimises that
    instead. The error is the cross-entropy, the squared error or the binary cross-entropy, summed or averaged, that
    explains most of the loss; it is large above half of what the best constant would have.

    Args:
        share: of the loss that the error may be.
        batches: measured running that must agree.
    """

    share: float = 0.1
    batches: int = 4
    advice: str = (
        "Another term outweighs the error of the prediction (a penalty, a balancing or regularising term, a KL term): "
        "check the weights of the loss's terms, and that all are averaged over the same things."
    )

    is_core = False
    needs = frozenset({"loss", "baseline_loss", "target_variance", "binary_baseline", "output_units", *FORMULAS})
    awaits = frozenset(FORMULAS)
    low_is_worse = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("share", 0 < self.share < 1, "0 and below 1", "above")
        self._require("batches", self.batches >= 1, 1)

    def init(self) -> State:
        return {"loss": Progress(), "running": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        loss = progress(Progress(*state["loss"]), record.loss, record.num_samples)
        found = _largest_error(record) if math.isfinite(record.loss) else None
        if found is None:
            return self.unjudged(record, "outputs and targets are not known"), {**state, "loss": tuple(loss)}
        share, level = found
        outweighed = share < self.share and level > 0.5
        running = state["running"] + 1 if outweighed else 0
        fires = running >= self.batches and loss.seen >= 50
        text = f"the error of the prediction is {{value:.1%}} of the loss, and {level:.0%} of a constant's"
        return self.whole(record, fires, share, self.share, text), {"loss": tuple(loss), "running": running}

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if block.has_any(self.awaits):
            return None
        loss = tuple(progress_over(Progress(*state["loss"]), block.losses, block.samples))
        return Passed({**state, "loss": loss}, 0, "outputs and targets are not known")


_BASELINES = dict(zip(FORMULAS, ("baseline_loss", "target_variance", "binary_baseline"), strict=True))


def _largest_error(record: StepRecord) -> tuple[float, float] | None:
    """Return which share of the loss the error is at most, and how large it is beside the best constant's."""
    shares, levels = [], []
    of_classes = math.isfinite(record.scalars.get("cross_entropy", math.nan))
    for name in FORMULAS[:1] if of_classes else FORMULAS:
        value, baseline = record.scalars.get(name, math.nan), record.scalars.get(_BASELINES[name], math.nan)
        if math.isfinite(value) and baseline > 1e-9 and record.loss > 0:
            levels.append(value / baseline)
            # Any that is larger than the loss is none of its terms.
            shares += [s for scale in reductions(record).values() if (s := scale * value / record.loss) <= 1.05]
    return (max(shares), min(levels)) if shares else None
