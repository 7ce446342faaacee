"""The loss does not improve, or the model gives one answer for every input."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from ..records import Index, StepRecord
from ._block import Block, Passed
from ._company import COMPANY, has_company
from ._findings import Findings
from ._kinds import FINE_TUNING, VALUES, is_of
from ._loss import remember, remember_over
from ._reductions import reductions
from ._rule import Rule, State
from ._selection import select
from ._updates import clipped_to_nothing, usual_update
from ._windows import HEAD, Progress, median

__all__ = ["ConstantOutput", "NotLearning"]

_LEVELS = (
    ("cross_entropy", "baseline_loss", ""),
    ("squared_error", "target_variance", ""),
    ("binary_cross_entropy", "binary_baseline", "binary_least"),
)
"""The loss of a batch by formula, the best constant's, and the least there can be (0 where none stands)."""
_MEASURED = frozenset({"update_ratio", *(name for level in _LEVELS for name in level if name)})


_RUNNING = 4
"""Batches measured running that are compared with a guess."""


class NotLearning(Rule):
    """Flags a loss that is no better than guessing, or that has not fallen.

    No better than guessing: what the best constant prediction reaches is known from the targets, the entropy of the
    classes' shares or the variance. Where the last measured batches are all above `guess` of it, after `after` losses,
    and come no nearer, nothing was learned, however bad the first loss was: where the loss is that error, or has fallen
    by less than a fifth. Not judged while the learning rate rises,
    nor while losses go down, however slowly, since the first quarter of the run. A cross-entropy that is above `worse`
    of it at four measured batches running is worse than guessing, after `worse_after` losses already.

    Where no such level is known, or the loss is no better than half of it: first level minus the median of the last
    fifth is below `share` of the first.
    Judged when `start` losses were seen, then every `every`, and at the end of a run of 100 losses or more (of
    `start`, where a model is fine-tuned): deep nets may lie on a plateau for their first hundreds of steps. Not
    flagged where the lower quartile of the last fifth is 30 % below the least of the first losses: then outliers
    hide what was learned; nor where the loss rose by more than half, which is for `diverging`. In batches of fewer
    than a dozen samples means stand for medians. Works for negative losses.

    Optimizers that step in turns on losses of their own play against each other, and so do several watched trainings
    in one program that do: not judged. Where values are learned from themselves (reinforcement learning, target
    networks) their error need not fall: only whether it is better than guessing is judged.

    Args:
        guess: share of the best constant's loss that is no better than guessing.
        after: losses before that is judged.
        worse: share of it that is worse than guessing.
        worse_after: losses before that is judged.
        share: of the first level by which the loss must have fallen.
        start: losses before the first judgement.
        every: losses between judgements.
    """

    guess: float = 0.93
    after: int = 300
    worse: float = 1.02
    worse_after: int = 200
    share: float = 0.02
    start: int = 300
    every: int = 500
    severity: str = "critical"
    keep_firing_for: int = 0
    advice: str = (
        "Usually the learning rate (far too low or too high), labels that do not match the inputs (shuffled, or off by "
        "a row), a wrong loss, weights of the loss's terms (a KL or a penalty that outweighs the rest), or weights "
        "that get no gradient. Overfit one batch; "
        "then change the learning rate by 10 either way; check labels, the sign of the loss, the last activation and "
        "the initialisation."
    )

    needs = frozenset(
        {"loss", "baseline_loss", "update_ratio", "global_norm_applied", *VALUES, *FINE_TUNING, *COMPANY}
        | {n for level in _LEVELS for n in level if n}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("guess", 0 < self.guess <= 1, "0 and at most 1", "above")
        self._require("share", self.share > 0, 0, "above")
        self._require("start", self.start >= 20, 20)
        self._require("every", self.every >= 1, 1)

    def init(self) -> State:
        # Every `stride`-th loss is kept, and the stride doubles when they are too many.
        return {
            "loss": Progress(),
            "kept": (),
            "stride": 1,
            "guesses": (),
            "lr": math.nan,
            "update": math.nan,
            "follows": False,
            "values": False,
            "tuned": False,
        }

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        ending = record.scalars.get("end_of_run", 0.0) > 0
        if has_company(record):
            return self.unjudged(record, "several optimizers step in turns"), state
        if not math.isfinite(record.loss) and not ending:
            return self.unjudged(record, "no finite loss was given"), state
        state = self._look(record, remember(record.loss, state, record.num_samples))
        values, tuned = state["values"] or is_of(record, VALUES), state["tuned"] or is_of(record, FINE_TUNING)
        state = {**state, "values": values, "tuned": tuned}
        loss, guesses = Progress(*state["loss"]), state["guesses"]
        if len(guesses) >= _RUNNING and loss.seen >= self.worse_after and "cross_entropy" in record.scalars:
            said = self._against_guess(record, state, self.worse)
            if len(said):
                return said, state
        # At its end a shorter run has shown as much as it ever will.
        least, after = (3, self.worse_after) if ending else (_RUNNING, self.after)
        if len(guesses) >= least and loss.seen >= after and (ending or self._level(record)):
            said = self._against_guess(record, state, self.guess)
            if len(said):
                return said, state
        due = loss.seen >= self.start and (loss.seen - self.start) % self.every == 0
        # What is fine-tuned begins where it may well stay for a while: a short run of it tells little.
        least = self.start if state["tuned"] else 100
        if not (due or (ending and loss.seen >= least)):
            return self.unjudged(record, f"judged at {self.start} losses and every {self.every} after"), state
        if state["values"]:
            return self.unjudged(record, "its values need not fall"), state
        if guesses and _share(guesses[-1]) < 0.5:
            return self.clear(record), state
        kept = state["kept"]
        recent = sorted(kept[-max(5, len(kept) // 5) :])
        now, easy, easiest = median(tuple(recent)), recent[len(recent) // 4], min(loss.first)
        start = loss.start
        if len(loss.first) > HEAD:
            # Small batches: what is learned shows in how bad the bad ones are, and not in the median.
            start, now = math.fsum(loss.first) / len(loss.first), math.fsum(recent) / len(recent)
        limit = start - self.share * abs(start)
        # Where half of the batches hold an outlier the median says little, and the easy batches say much. What rose
        # by half is left to `diverging`, which asks the gradients, too.
        stuck = limit < now < start + 0.5 * abs(start) and easy > easiest - 0.3 * abs(easiest)
        text = f"loss {now:.4g}, it began at {start:.4g}{self._because(record, state)}"
        return self.whole(record, stuck, now, limit, text), state

    def _look(self, record: StepRecord, state: State) -> State:
        """Take in what was measured of this step, now and then."""
        if "update_ratio" in record.columns:
            chosen = select(record.index, self.paths, min_ndim=2) & record.measured("update_ratio")
            ratios = record.columns["update_ratio"][chosen]
            if len(ratios):
                state = {**state, "update": float(np.median(ratios))}
        found = self._level(record)
        if found is None or Progress(*state["loss"]).seen < 40:
            return state
        rises = record.lr > 1.02 * state["lr"]
        guesses = () if rises else state["guesses"]
        near = [abs(record.loss - scale * found[0]) for scale in reductions(record).values()]
        follows = min(near) <= 0.2 * abs(record.loss)
        return {**state, "guesses": (*guesses[1 - _RUNNING :], found), "lr": record.lr, "follows": follows}

    @staticmethod
    def _level(record: StepRecord) -> tuple[float, float, float] | None:
        """Return the batch's loss, the best constant's and the least one; the lowest of several that may be meant."""
        scalars = record.scalars
        if 0 < record.num_samples < 8:
            return None  # what so few targets vary by is chance
        named = [(*(scalars.get(n, math.nan) for n in names[:2]), scalars.get(names[2], 0.0)) for names in _LEVELS]
        found = [
            (value, level, least) for value, level, least in named if math.isfinite(value) and level - least > 1e-6
        ]
        return min(found, key=_share, default=None)

    def _against_guess(self, record: StepRecord, state: State, least_share: float) -> Findings:
        shares = [_share(guess) for guess in state["guesses"]]
        value, level, least = state["guesses"][-1]
        nearer = shares[-1] == min(shares) < shares[0] - 0.02
        if least_share > 1:
            # From far above it, noise alone comes nearer now and then: half of the way, or none.
            nearer = shares[-1] - 1 < 0.5 * (shares[0] - 1)
        guessing = min(shares) > least_share and not nearer
        # Down to where a guess would be is no way that anything was learned on.
        guessing = guessing and (least_share > 1 or not _creeps(state))
        # Scores of a margin, logarithms of rates: the loss says that they are learned, and no such error does.
        guessing = guessing and (state["follows"] or Progress(*state["loss"]).is_stuck(0.2))
        what = "worse" if least_share > 1 else "no better"
        text = (
            f"after {Progress(*state['loss']).seen} losses {{value:.4g}}, {what} than guessing: the best constant "
            f"has {level:.4g}{self._because(record, state)}"
        )
        return self.whole(record, guessing, value, least + least_share * (level - least), text)

    @staticmethod
    def _because(record: StepRecord, state: State) -> str:
        update, frozen = state["update"], _frozen_share(record.index)
        rate = f" ({record.lr:.2g})" if math.isfinite(record.lr) else ""
        if frozen > _MOSTLY:
            return f"; {frozen:.0%} of the model is frozen: check `requires_grad`"
        if clipped := clipped_to_nothing(record):
            return f"; {clipped}"
        if update > 0.03:
            return f"; each update is {update:.2g} of the weights: lower the learning rate{rate}"
        if not update and (dead := _without_gradient(record)):
            return f"; {dead}"
        if update < 1e-4:
            return f"; each update is {update:.1g} of the weights: raise the learning rate{rate}"
        return ""

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if block.has_any(_MEASURED) or "end_of_run" in block.names or not block.has_finite_losses:
            return None
        if block.has_any(COMPANY):
            return Passed(state, 0, "several optimizers step in turns")
        seen = Progress(*state["loss"]).seen
        due = any((n - self.start) % self.every == 0 for n in range(max(seen + 1, self.start), seen + len(block) + 1))
        if due:
            return None
        after = remember_over(block.losses, state, block.samples)
        after = {**after, "values": state["values"] or block.has_any(VALUES)}
        return Passed(after, 0, f"judged at {self.start} losses and every {self.every} after")


_MOSTLY = 0.5
"""Share of a model that, frozen, may be why it does not learn."""


def _without_gradient(record: StepRecord) -> str:
    """Return that most parameters have a gradient of zeros, as a phrase; "" where they have not."""
    column = record.columns.get("grad_norm")
    if column is None:
        return ""
    norms = column[record.measured("grad_norm")]
    num = int((norms == 0).sum())
    if 2 * num < len(norms) or not num:
        return ""
    return f"{num} of {len(norms)} parameters have a gradient of zeros: what lies behind them is dead or constant"


def _frozen_share(index: Index) -> float:
    """Return which share of the model's elements requires no gradient."""
    total = int(index.numel[index.is_parameter].sum())
    return float(index.numel[index.is_parameter & ~index.trainable].sum()) / max(total, 1)


def _creeps(state: State) -> bool:
    """Return whether the loss has gone down since the first quarter of the run: a plateau that is being left, however
    slowly.

    Of what came after, in four stretches: by more than three times what the median of one varies by, or each below the
    one before.
    """
    size = 3 * len(state["kept"]) // 16
    if size < 10:
        return False
    stretches = [state["kept"][len(state["kept"]) - (4 - i) * size :][:size] for i in range(4)]
    levels = [median(stretch) for stretch in stretches]
    distances = [abs(x - level) for stretch, level in zip(stretches, levels, strict=True) for x in stretch]
    varies = _OF_MEDIANS * median(tuple(distances)) / math.sqrt(size)
    return levels[0] - levels[-1] > 3 * varies or all(a > b for a, b in pairwise(levels))


_OF_MEDIANS = 1.4826 * 1.2533 * math.sqrt(2)
"""Median distance to standard deviation, that to the one of a median of one, that to the one of a difference of two."""


def _share(guess: tuple[float, float, float]) -> float:
    """Return a loss where 0 is the least and 1 is that of the best constant."""
    value, level, least = guess
    return (value - least) / (level - least)


class ConstantOutput(Rule):
    """Flags a model that gives the same output for every sample of the batch, while the loss is not near zero.

    Largest variance of an output unit over the batch < `variance` (times the squared size of the outputs where that
    is above 1). Batches of one are not judged. A softmax over one unit is the classic case.

    Args:
        variance: over the batch that is too little.
        min_loss: a loss of at most this size is learned.
    """

    variance: float = 1e-12
    min_loss: float = 1e-4
    severity: str = "critical"
    for_steps: int = 20
    warmup: int = 5
    advice: str = (
        "Usually a softmax over one unit (which is always 1: use a sigmoid), dead or saturated units before the "
        "output, or an input that never reaches it. Look for the first layer that gives the same for all samples."
    )

    is_core = False
    needs = frozenset(
        {"output_batch_variance", "output_units", "output_min", "output_max", "update_ratio", "param_norm"}
    )
    awaits = frozenset({"output_batch_variance", "update_ratio"})
    low_is_worse = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("variance", self.variance > 0, 0, "above")

    def init(self) -> State:
        return {"update": 0.0, "size": math.nan, "left": 1.0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        state = self._remembered(record, state)
        variance = record.scalars.get("output_batch_variance", math.nan)
        if not math.isfinite(variance):
            return self.unjudged(record, "the model's output was not measured"), state
        if record.scalars.get("batch_size", 2.0) < 2:
            return self.unjudged(record, "a batch of one has no variance"), state
        if record.has_loss and not abs(record.loss) > self.min_loss:
            return self.clear(record), state
        size = max(abs(record.scalars.get(k, 0.0)) for k in ("output_min", "output_max"))
        limit = self.variance * max(1.0, size * size)
        ones = record.scalars.get("output_min") == record.scalars.get("output_max") == 1
        is_softmax = ones and record.scalars.get("output_units") == 1
        text = "variance of the output over the batch {value:.2g}" + ": the softmax of one unit is 1" * is_softmax
        if state["update"] > _LARGE:
            text += f", after updates of {state['update']:.2g} of the weights: the learning rate is too high"
        elif state["left"] < _SHRUNK:
            text += f", and weights are {state['left']:.2g} of what they were: a regularisation pulls them to zero"
        return self.whole(record, variance < limit, variance, limit, text), state

    def _remembered(self, record: StepRecord, state: State) -> State:
        """Return the memory with the largest update so far, and with how much of the weights is left."""
        if not {"update_ratio", "param_norm"} <= set(record.columns):
            return state
        chosen = select(record.index, self.paths, min_ndim=2) & record.measured("param_norm")
        now = float(np.median(record.columns["param_norm"][chosen])) if chosen.any() else math.nan
        size = now if math.isnan(state["size"]) else state["size"]
        left = now / size if size > 0 else 1.0
        return {"update": max(state["update"], usual_update(record)), "size": size, "left": left}


_SHRUNK = 0.05
"""Share of their first norms that weights have left where something has pulled them to zero."""
_LARGE = 0.1
"""Update over its weight from which on the learning rate is too high."""
