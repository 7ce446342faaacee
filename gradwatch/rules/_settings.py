"""What optimizers, schedules and layers are set to, where it explains what is measured beside it."""

from __future__ import annotations

import math

import numpy as np

from ..records import Floats, StepRecord
from ._block import Block, Passed
from ._company import COMPANY, has_company
from ._findings import Findings
from ._rule import Rule, State
from ._selection import select
from ._updates import clipped_to_nothing, is_effective
from ._windows import Progress, progress, progress_over

__all__ = [
    "BatchNormStatistics",
    "DropoutTooLarge",
    "EpsilonTooLarge",
    "EvalMode",
    "LearningRateGone",
    "WeightDecayTooLarge",
    "WeightsOverwritten",
]


class LearningRateGone(Rule):
    """Flags a training that goes on though its learning rate has all but gone.

    The rate is below `share` of its highest, and was so for `steps` steps and a third of all steps so far. A cosine's
    last steps, a cycle's end or a plateau's reductions are shorter.

    Args:
        share: of the highest learning rate.
        steps: so small, at least.
    """

    share: float = 1e-3
    steps: int = 50
    advice: str = (
        "The schedule decays too fast: usually the scheduler is stepped once a batch where it counts epochs, or twice "
        "a step, or its number of steps is that of a shorter run. Nothing is learned any more: step it as often as its "
        "settings mean, and start again."
    )

    is_core = False
    needs = frozenset({"lr"})
    low_is_worse = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("share", 0 < self.share < 1, "0 and below 1", "above")
        self._require("steps", self.steps >= 2, 2)

    def init(self) -> State:
        return {"highest": 0.0, "low": 0, "seen": 0, "since": -1}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if not math.isfinite(record.lr):
            return self.unjudged(record, "no learning rate is known"), state
        state = self._after(state, record.lr, record.step)
        gone = state["low"] >= max(self.steps, state["seen"] / 3)
        share = record.lr / state["highest"] if state["highest"] else 1.0
        text = f"the learning rate is {record.lr:.2g}, {{value:.1g}} of its highest, since step {state['since']}"
        return self.whole(record, gone, share, self.share, text), state

    def _after(self, state: State, lr: float, step: int) -> State:
        highest = max(state["highest"], lr)
        low = state["low"] + 1 if lr < self.share * highest else 0
        since = step if low == 1 else state["since"] if low else -1
        return {"highest": highest, "low": low, "seen": state["seen"] + 1, "since": since}

    def pass_over(self, block: Block, state: State) -> Passed | None:
        for record in block.records:
            if not math.isfinite(record.lr):
                return None
            state = self._after(state, record.lr, record.step)
            if state["low"] >= self.steps:
                return None
        return Passed(state, len(block))


class _Stuck(Rule):
    """Judges a setting where it was measured `times` running, while the loss does not improve."""

    times: int = 3
    stuck: float = 0.5
    is_core = False
    needs = frozenset({"loss"})

    def init(self) -> State:
        return {"loss": Progress(), "running": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        loss = progress(Progress(*state["loss"]), record.loss, record.num_samples)
        state = self._remembered(record, {**state, "loss": tuple(loss)})
        found = self._measured(record, state) if is_effective(record) else None
        if found is None:
            return self.unjudged(record, "it was not measured"), state
        value, limit, text = found
        running = state["running"] + 1 if value > limit else 0
        state = {**state, "running": running}
        if loss.seen < 50:
            return self.unjudged(record, "the loss is not known over 50 steps"), state
        fires = running >= self.times and loss.is_stuck(self.stuck, after=50) and not has_company(record)
        return self.whole(record, fires, value, limit, text), state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if block.has_any(self.awaits):
            return None
        loss = progress_over(Progress(*state["loss"]), block.losses, block.samples)
        return Passed({**state, "loss": tuple(loss)}, 0, "it was not measured")

    def _measured(self, record: StepRecord, state: State) -> tuple[float, float, str] | None:
        """Return a value, the limit above which it is too much, and the text; None where it was not measured."""
        raise NotImplementedError

    def _remembered(self, record: StepRecord, state: State) -> State:
        """Return the memory with what is to be remembered of a record beside its loss."""
        return state


class WeightDecayTooLarge(_Stuck):
    """Flags weight decay that moves the weights more than the gradient does, while the loss does not improve.

    As L2 in the gradient: `weight_decay * norm(weight) / norm(gradient)`. Beside it (AdamW): the share of the update
    that is decay, `lr * weight_decay * norm(weight) / norm(update)`. The median over all weights of two dimensions or
    more; and these must have shrunk, else it is the gradient that is small. A decay that is usual (0.001 within the
    gradient, or so much of the weights at a step beside it) is not too large, however small the gradient is: something
    else makes that vanish.

    Args:
        ratio: that is too much.
        usual: decay that is no more than usual.
        shrunk: share of their first norms that weights have left.
        times: measurements running.
        stuck: share of its first level by which the loss must have fallen to be improving.
    """

    ratio: float = 0.5
    usual: float = 1e-3
    shrunk: float = 0.7
    advice: str = (
        "The weight decay (the regularisation) is too large: it pulls the weights to zero faster than the gradient "
        "moves them. Usual is 0.01 to 0.1 for AdamW, 1e-4 for SGD and for L2 in Adam."
    )

    is_core = False
    needs = frozenset(
        {"loss", "weight_decay", "decay_is_decoupled", "param_norm", "update_norm", "grad_norm", "global_norm_applied"}
    )
    awaits = frozenset({"weight_decay"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("ratio", self.ratio > 0, 0, "above")

    def init(self) -> State:
        return {**super().init(), "size": math.nan}

    def _remembered(self, record: StepRecord, state: State) -> State:
        if math.isfinite(state["size"]) or "param_norm" not in record.columns:
            return state
        return {**state, "size": self._size(record)}

    def _size(self, record: StepRecord) -> float:
        chosen = select(record.index, self.paths, min_ndim=2) & record.measured("param_norm")
        return float(np.median(record.columns["param_norm"][chosen])) if chosen.any() else math.nan

    def _measured(self, record: StepRecord, state: State) -> tuple[float, float, str] | None:
        decay = record.scalars.get("weight_decay", math.nan)
        if not math.isfinite(decay) or not {"param_norm", "update_norm", "grad_norm"} <= set(record.columns):
            return None
        beside = record.scalars.get("decay_is_decoupled", 0.0) > 0
        if decay * (record.lr if beside else 1.0) <= self.usual:
            return 0.0, self.ratio, ""
        against: Floats = record.columns["update_norm" if beside else "grad_norm"]
        pull = decay * record.columns["param_norm"] * (record.lr if beside else 1.0)
        chosen = select(record.index, self.paths, min_ndim=2) & record.measured("update_norm") & (against > 0)
        if not chosen.any():
            return None
        left = self._size(record) / state["size"] if state["size"] > 0 else 1.0
        if not left < self.shrunk:
            return 0.0, self.ratio, ""
        value = float(np.median(pull[chosen] / against[chosen]))
        what = "of an update is decay" if beside else "times the gradient is the pull of the decay"
        text = f"weight decay {decay:g}: {{value:.2g}} {what}, and weights are {left:.0%} of what they were"
        if clipped := clipped_to_nothing(record):
            text += f", because {clipped}"
        return value, self.ratio, text


class EpsilonTooLarge(_Stuck):
    """Flags an epsilon of Adam's that outweighs the root of the second moments it is added to, while the loss does not
    improve: then steps shrink with the gradients, as in SGD with a learning rate of `lr / epsilon`.

    Args:
        ratio: epsilon over that root.
        times: measurements running.
        stuck: share of its first level by which the loss must have fallen to be improving.
    """

    ratio: float = 10.0
    severity: str = "warning"
    advice: str = (
        "Adam's epsilon is larger than the gradients: each step is smaller by that factor. Lower epsilon (1e-8 is "
        "usual), or check why gradients are so small: a loss divided twice, vanishing layers, or underflow in float16 "
        "without a loss scaler."
    )

    is_core = False
    needs = frozenset({"loss", "epsilon", "beta2", "second_moments", "num_second_moments"})
    awaits = frozenset({"second_moments"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("ratio", self.ratio > 0, 0, "above")

    def _measured(self, record: StepRecord, state: State) -> tuple[float, float, str] | None:
        names = ("epsilon", "beta2", "second_moments", "num_second_moments")
        epsilon, beta2, size, count = (record.scalars.get(name, math.nan) for name in names)
        # Adam takes the bias of its first steps out before it adds epsilon.
        count *= 1 - beta2 ** max(Progress(*state["loss"]).seen, 1) if 0 < beta2 < 1 else 1.0
        if not (math.isfinite(size) and count > 0):
            return None
        if size == 0:
            text = "Adam's second moments are 0: gradients are zero, or so small that their squares underflow"
            return epsilon / 1e-30, self.ratio, text
        ratio = epsilon / math.sqrt(size / count)
        return ratio, self.ratio, f"Adam's epsilon {epsilon:g} is {{value:.3g}} times the root of its second moments"


class DropoutTooLarge(_Stuck):
    """Flags dropout that leaves next to nothing of what a layer gives, while the loss does not improve.

    Usual is .1 to .5. The commonest slip is to give the share that is kept, as older libraries took it.

    Args:
        ratio: share that is dropped, above which it is too much.
        times: measurements running.
        stuck: share of its first level by which the loss must have fallen to be improving.
    """

    ratio: float = 0.8
    advice: str = (
        "The dropout rate is too large: it is the share that is dropped, not the one that is kept. Usual is 0.1 to 0.5."
    )

    is_core = False
    needs = frozenset({"loss", "dropout_rate"})
    awaits = frozenset({"dropout_rate"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("ratio", 0 < self.ratio < 1, "0 and below 1", "above")

    def _measured(self, record: StepRecord, state: State) -> tuple[float, float, str] | None:
        rate = record.scalars.get("dropout_rate", math.nan)
        text = "dropout takes {value:.0%} of what a layer gives"
        return (rate, self.ratio, text) if math.isfinite(rate) else None


class WeightsOverwritten(_Stuck):
    """Flags weights that something beside the optimizer writes between steps, while the loss does not improve.

    Clips of weights, norms that are kept and averages that are swapped in and out write them, too, and training learns.
    Not judged where several optimizers step in turns.

    Args:
        ratio: share of the parameters.
        times: measurements running.
        stuck: share of its first level by which the loss must have fallen to be improving.
    """

    ratio: float = 0.5
    stuck: float = 0.2
    advice: str = (
        "Something writes the weights between the optimizer's steps: averaged weights (EMA) or a checkpoint written "
        "back into the model that is trained, a sync, a projection. Keep averages in a copy of the model."
    )

    is_core = False
    needs = frozenset({"loss", "written_between", *COMPANY})
    awaits = frozenset({"written_between"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("ratio", self.ratio > 0, 0, "above")

    def _measured(self, record: StepRecord, state: State) -> tuple[float, float, str] | None:
        share = record.scalars.get("written_between", math.nan)
        text = "{value:.0%} of the parameters were overwritten since the optimizer's last step"
        return (share, self.ratio, text) if math.isfinite(share) else None


class EvalMode(Rule):
    """Flags layers that stay in eval mode while they are trained: BatchNorm that never saw a batch in training mode, or
    BatchNorm and dropout that once were in training mode and are no more.

    BatchNorm that came with statistics and is kept in eval mode is somebody's choice.

    Args:
        times: measurements running.
    """

    times: int = 3
    advice: str = (
        "`model.eval()` was called before the training loop, or `model.train()` was not called after a validation: "
        "BatchNorm normalises by stale statistics and dropout does nothing. Call `model.train()` before each step."
    )

    is_core = False
    needs = frozenset({"batch_norm_in_eval", "batch_norm_batches", "batch_norm_means", "dropout_in_eval"})
    awaits = frozenset({"batch_norm_in_eval", "dropout_in_eval"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("times", self.times >= 1, 1)

    def init(self) -> State:
        return {"norm": False, "drop": False, "running": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        norm, drop = (record.scalars.get(n, math.nan) for n in ("batch_norm_in_eval", "dropout_in_eval"))
        if math.isnan(norm) and math.isnan(drop):
            return self.unjudged(record, "no BatchNorm or dropout, or not measured at this step"), state
        untouched = record.scalars.get("batch_norm_batches", math.nan) == 0
        untouched &= record.scalars.get("batch_norm_means", math.nan) == 0
        bad = (norm >= 0.5 and (untouched or state["norm"])) or (drop == 1 and state["drop"])
        state = {
            "norm": state["norm"] or norm < 0.5,
            "drop": state["drop"] or drop < 1,
            "running": state["running"] + 1 if bad else 0,
        }
        value = norm if norm >= 0.5 else drop
        what = "BatchNorm" if norm >= 0.5 else "dropout"
        text = f"{{value:.0%}} of the {what} layers are in eval mode while the model is trained"
        return self.whole(record, state["running"] >= self.times, value, 0.0, text), state


class BatchNormStatistics(Rule):
    """Flags running statistics of BatchNorm that don't follow the data, where evaluation shows it.

    A layer with momentum m has taken in `1 - (1 - m) ** n` of what n batches showed; below `followed` after
    `batches` batches its statistics are still those it began with. With a momentum of .9 or above they are those of
    the last batch alone. Flagged while the validation loss is worse than the training loss by a fifth of it.

    Args:
        followed: share of the data's statistics that is too little.
        batches: seen before it is judged.
    """

    followed: float = 0.5
    batches: int = 50
    advice: str = (
        "BatchNorm's running statistics, which eval mode uses, are not those of the data. Its `momentum` in torch is "
        "the weight of the new batch (0.1 is usual; TensorFlow's 0.99 is 0.01 here)."
    )

    is_core = False
    needs = frozenset({"loss", "val_loss", "batch_norm_followed", "batch_norm_batches", "batch_norm_momentum"})
    low_is_worse = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("followed", 0 < self.followed < 1, "0 and below 1", "above")

    def init(self) -> State:
        return {"loss": Progress(), "val": None}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        loss = progress(Progress(*state["loss"]), record.loss, record.num_samples)
        val = record.scalars.get("val_loss", state["val"])
        state = {"loss": tuple(loss), "val": val}
        followed, seen, momentum = (
            record.scalars.get(f"batch_norm_{n}", math.nan) for n in ("followed", "batches", "momentum")
        )
        if val is None or not math.isfinite(followed) or seen < self.batches:
            return self.unjudged(record, "no BatchNorm, or no validation loss yet"), state
        worse = not math.isfinite(val) or val > loss.now + 0.2 * abs(loss.now)
        bad = worse and (followed < self.followed or momentum >= 0.9)
        text = f"running statistics hold {{value:.2g}} of what {seen:.0f} batches showed (momentum {momentum:g})"
        return self.whole(record, bad, followed, self.followed, text), state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if block.has_any({"val_loss", "batch_norm_followed"}):
            return None
        loss = progress_over(Progress(*state["loss"]), block.losses, block.samples)
        return Passed({"loss": tuple(loss), "val": state["val"]}, 0, "no BatchNorm, or no validation loss yet")
