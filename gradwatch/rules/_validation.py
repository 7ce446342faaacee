"""What validation shows, where a user gives it."""

from __future__ import annotations

import math
import re
from typing import ClassVar

from ..records import StepRecord
from ._block import Block, Passed
from ._findings import Findings
from ._rule import Rule, State
from ._windows import Progress, progress, progress_over

__all__ = ["Overfit", "TrainEvalMismatch", "ValNotLearning"]


_INPUTS, _VAL_INPUTS = ("input_mean", "input_std"), ("val_input_mean", "val_input_std")


_LEVELS = {"squared_error": ("target_variance", 0.1), "cross_entropy": ("baseline_loss", 0.02)}
"""Loss by formula -> the best constant's, and by how much of it a training loss is below it that has learned."""


class _Evaluations(Rule):
    """Judges when a validation loss is given; the condition must hold at `evaluations` of them running."""

    evaluations: int = 5
    is_core = False
    needs = frozenset({"loss", "val_loss"})
    keep_firing_for = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("evaluations", self.evaluations >= 1, 1)

    def init(self) -> State:
        return {"loss": Progress(), "first": None, "best": None, "running": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        loss = progress(Progress(*state["loss"]), record.loss, record.num_samples)
        value = record.scalars.get(self._value, math.nan)
        if not math.isfinite(value):
            return self.unjudged(record, f"`{self._value}` was not given"), {**state, "loss": tuple(loss)}
        state = {**state, "first": value if state["first"] is None else state["first"]}
        limit = self._limit(loss, state)
        running = state["running"] + 1 if value > limit else 0
        enough = self._enough(state)
        best = value if state["best"] is None else min(state["best"], value)
        state = {**state, "loss": tuple(loss), "best": best, "running": running}
        text = self._text(loss, best, state)
        return self.whole(record, running >= enough or self._also(loss, state), value, limit, text), state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if block.has_any({self._value, *self._on_the_way}):
            return None
        loss = progress_over(Progress(*state["loss"]), block.losses, block.samples)
        return Passed({**state, "loss": tuple(loss)}, 0, f"`{self._value}` was not given")

    _on_the_way: ClassVar[frozenset[str]] = frozenset()
    """What is remembered, beside the loss, of records without an evaluation."""

    @property
    def _value(self) -> str:
        return "val_loss"

    def _limit(self, loss: Progress, state: State) -> float:
        raise NotImplementedError

    def _enough(self, state: State) -> int:
        """Return how many evaluations running it takes."""
        return self.evaluations

    def _also(self, loss: Progress, state: State) -> bool:
        """Return whether something else than the limit is ground enough."""
        return False

    def _text(self, loss: Progress, best: float, state: State) -> str:
        return f"validation loss {{value:.4g}}, best {best:.4g}, training loss {loss.now:.4g}"


class Overfit(_Evaluations):
    """Flags a validation loss that is above its best by more than `ratio` - 1 of its size, evaluation after evaluation,
    while the training loss is below it.

    Not while a validation score (`val_acc`, `val_f1`, `val_metric`, ...: any between 0 and 1 that is no loss or error)
    is within 2 % of its best: a model that is sure of its few errors has a larger loss and predicts as well.

    Args:
        ratio: times the best validation loss.
        evaluations: running.
    """

    ratio: float = 1.3
    evaluations: int = 5
    advice: str = "The model learns the training set by heart: stop earlier, regularise, augment, or get more data."

    def init(self) -> State:
        return {**super().init(), "score": None, "keeps": False}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        kept = {"score": state["score"], "keeps": state["keeps"]}
        score = max((v for k, v in record.scalars.items() if _is_score(k, v)), default=None)
        if score is not None:
            best = score if state["score"] is None else max(score, state["score"])
            kept = {"score": best, "keeps": score >= 0.98 * best}
        findings, after = super().judge(record, {**state, **kept})
        return findings, {**kept, **after}

    def _limit(self, loss: Progress, state: State) -> float:
        best = state["best"]
        if best is None or not loss.seen or state["keeps"]:
            return math.inf
        return max(best + (self.ratio - 1) * abs(best), loss.now)


def _is_score(name: str, value: float) -> bool:
    """Return whether a validation metric is one of which more is better."""
    if name.startswith("val_input_"):
        return False
    words = ("loss", "error", "err", "ppl", "perplexity", "mse", "mae", "rmse", "wer", "cer", "fid")
    return name.startswith("val_") and 0 < value <= 1 and not any(word in name.lower() for word in words)


_GOOD = re.compile(
    r"(^|_)(acc(uracy)?|top_?\d|f_?1|iou|miou|jaccard|dice|auc|auroc|ap|map|precision|recall|r2|score|metric)(_|$)",
    re.I,
)
"""Names of validation scores of which more is better."""


class ValNotLearning(_Evaluations):
    """Flags a validation loss that stays where it began, or where a constant would be, while the training loss falls.

    Any of six, at `evaluations` running:

    * validation loss at least 97 % of its first value and 60 % of the first training loss, which itself has fallen by
      more than a fifth and lies a third lower;
    * validation loss at least 97 % of its first value and 95 % of the first training loss, which itself has fallen by
      more than a twelfth;
    * for a squared error or a cross-entropy: validation loss above what the best constant has (the variance, the
      entropy of the classes), while the training loss is below it, by 10 % of a variance or 2 % of an entropy;
    * validation loss never below `far` times what the untrained model had on training data, while the training loss
      has fallen: what the model is given there is of another scale;
    * a validation score (`val_acc`, `val_f1`, `val_iou`, `val_metric` and their like) below half of its best, while the
      training loss has fallen by more than a fifth;
    * inputs of validation, where they are known, are of another scale than those of training (three deviations away, or
      a deviation three times as large or as small), and its loss is above the training loss by a third: at two running.
      Where they are ten deviations away, or ten times as wide, any loss above it will do: some models bear much.

    Args:
        evaluations: running.
        far: times the first level of the training loss.
    """

    evaluations: int = 5
    far: float = 10.0
    advice: str = (
        "What is learned does not carry over: training and validation data are prepared differently, labels of one "
        "are shuffled, or training labels are noise. Evaluate on training data; compare the two pipelines."
    )

    needs = frozenset({"loss", "val_loss", *_LEVELS, *(level for level, _ in _LEVELS.values()), *_INPUTS, *_VAL_INPUTS})
    _on_the_way = frozenset({*_LEVELS, *_INPUTS, *_VAL_INPUTS})

    def init(self) -> State:
        sums = dict.fromkeys(_LEVELS, (0, 0.0, 0.0, 0.0))
        return {**super().init(), **sums, "inputs": (), "val_inputs": (), "guesses": 0, "score": 0.0, "falls": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        sums = {name: _added(record, name, state[name]) for name in _LEVELS}
        inputs = _sizes(record, _INPUTS) or state["inputs"]
        seen: State = {**sums, "inputs": inputs, "val_inputs": _sizes(record, _VAL_INPUTS) or state["val_inputs"]}
        value = record.scalars.get(self._value, math.nan)
        if math.isfinite(value):
            seen["guesses"] = state["guesses"] + 1 if value > _level(sums)[0] else 0
            score = max((v for k, v in record.scalars.items() if _GOOD.search(k) and _is_score(k, v)), default=0.0)
            seen["score"] = max(score, state.get("score", 0.0))
            seen["falls"] = state.get("falls", 0) + 1 if 0 < score < 0.5 * seen["score"] else 0
        findings, after = super().judge(record, {**state, **seen})
        return findings, {**seen, **after}

    def _also(self, loss: Progress, state: State) -> bool:
        if state["falls"] >= self.evaluations and loss.now < loss.start - 0.2 * abs(loss.start):
            return True
        # No better than a guess for as long, and training is just getting below it.
        learned = _constant(loss, state) < math.inf
        return learned and state["guesses"] >= self.evaluations

    def _limit(self, loss: Progress, state: State) -> float:
        first = state["first"]
        if not loss.seen:
            return math.inf
        fall = (loss.start - loss.now) / abs(loss.start) if loss.start else 0.0
        limits = [_constant(loss, state)]
        best = state["best"]
        if loss.start > 0 and loss.now < loss.start and (best is None or best > self.far * loss.start):
            limits.append(self.far * loss.start)
        unmoved = first - 0.03 * abs(first)
        if fall > 0.2:
            # What was learned before the first evaluation counts, too.
            limits.append(max(unmoved, loss.now + 0.3 * abs(loss.now), loss.start - 0.4 * abs(loss.start)))
        if _differ(state):
            limits.append(loss.now if _differ(state, _FAR_APART) else loss.now + 0.3 * abs(loss.now))
        if fall > 0.08:
            limits.append(max(unmoved, loss.start - 0.05 * abs(loss.start)))
        return min(limits)

    def _enough(self, state: State) -> int:
        return min(2, self.evaluations) if _differ(state) else self.evaluations

    def _text(self, loss: Progress, best: float, state: State) -> str:
        text = super()._text(loss, best, state)
        if (level := _constant(loss, state)) < math.inf:
            text = f"{text}, a guess has {level:.4g}"
        if _differ(state):
            (mean, std), (val_mean, val_std) = state["inputs"], state["val_inputs"]
            return (
                f"{text}; validation inputs have mean {val_mean:.3g} and deviation {val_std:.3g}, training inputs "
                f"{mean:.3g} and {std:.3g}: they are prepared differently"
            )
        if state["falls"] >= self.evaluations:
            text = f"{text}, its score below half of its best ({state['score']:.3g})"
        if not best > self.far * loss.start > 0:
            return text
        return f"{text}; {best / loss.start:.0f} times what the untrained model had: inputs of another scale"


_Sums = tuple[int, float, float, float]


def _added(record: StepRecord, name: str, sums: _Sums) -> _Sums:
    """Return the sums of losses, of their formula and of the best constant's, over the batches that were measured."""
    now = record.loss, *(record.scalars.get(n, math.nan) for n in (name, _LEVELS[name][0]))
    if not all(map(math.isfinite, now)):
        return sums
    count, loss, error, level = sums
    return count + 1, loss + now[0], error + now[1], level + now[2]


def _level(state: State) -> tuple[float, float]:
    """Return the loss of the best constant, where the loss is one of the formulas, or nearly, and by how much of it
    what has learned is below; infinity where it is none.

    Of several the nearest: scores of classes may chance to have a squared error of the size of the loss.
    """
    found = []
    for name, (_, below) in _LEVELS.items():
        count, losses, errors, levels = state[name]
        if count >= 5 and abs(losses - errors) <= 0.2 * errors and levels > 0:
            found.append((abs(losses - errors) / errors, levels / count, below))
    _, level, below = min(found, default=(0.0, math.inf, 0.0))
    return level, below


def _constant(loss: Progress, state: State) -> float:
    """Return the loss of the best constant, where the training loss is below it; else infinity."""
    level, below = _level(state)
    return level if loss.now < (1 - below) * level else math.inf


def _sizes(record: StepRecord, names: tuple[str, str]) -> tuple[float, ...]:
    """Return mean and standard deviation of inputs; () where they were not measured."""
    found = tuple(record.scalars.get(name, math.nan) for name in names)
    return found if all(map(math.isfinite, found)) else ()


_APART, _FAR_APART = 3.0, 10.0
"""Deviations between two means, or times one deviation goes into the other."""


def _differ(state: State, times: float = _APART) -> bool:
    """Return whether inputs of validation are of another scale than those of training."""
    if not (state["inputs"] and state["val_inputs"]):
        return False
    (mean, std), (val_mean, val_std) = state["inputs"], state["val_inputs"]
    return abs(val_mean - mean) > times * std or not std / times <= val_std <= times * std


class TrainEvalMismatch(_Evaluations):
    """Flags a model that is much worse in eval mode than in train mode on the same training data.

    Loss in eval mode above `ratio` times that in train mode, and above it by a tenth of the first level. Batches of
    one are not judged.

    Args:
        ratio: times the loss in train mode.
        evaluations: running.
    """

    ratio: float = 2.0
    evaluations: int = 3
    advice: str = (
        "Usually BatchNorm statistics that do not fit (small batches, momentum, shared layers) or dropout before "
        "BatchNorm. Use larger batches or GroupNorm; check `model.eval()` and `model.train()` calls."
    )

    needs = frozenset({"loss", "train_eval_loss", "batch_size"})
    _on_the_way = frozenset({"batch_size"})

    @property
    def _value(self) -> str:
        return "train_eval_loss"

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if record.scalars.get("batch_size", 2.0) < 2:
            return self.unjudged(record, "batches of one"), state
        return super().judge(record, state)

    def _limit(self, loss: Progress, state: State) -> float:
        if not loss.seen:
            return math.inf
        return loss.now + max((self.ratio - 1) * abs(loss.now), 0.1 * abs(loss.start))

    def _text(self, loss: Progress, best: float, state: State) -> str:
        return f"loss in eval mode {{value:.4g}}, in train mode {loss.now:.4g}"
