"""The first hundred steps: a loss that blows up, one that creeps, one that follows a mistaken formula."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..records import StepRecord
from ._block import Block, Passed
from ._company import COMPANY, has_company
from ._findings import Findings
from ._kinds import VALUES, is_of
from ._reductions import reductions, summed_over
from ._rule import Rule, State
from ._selection import select
from ._updates import is_effective, usual_update
from ._windows import Progress, median, progress, progress_over

__all__ = ["BlownUp", "Crawling", "MistakenLoss"]


class BlownUp(Rule):
    """Flags a loss that rises to `ratio` times its first value within the first steps, stays there, and not once alone.

    The first loss is the only one that no step has touched. It stays where the median since the first such loss is as
    large: a few bad batches, with good ones between them, are none. Values that are learned from themselves grow by
    right, and so does the loss of a network whose opponent learns. Batches of fewer than eight samples are not judged:
    their losses differ by as much from the data alone. Nor are losses that are zero or below now and then, which have
    no level. Where nobody said what the loss compares (returns and advantages change with the policy, and so does their
    level), the median weight's update must have been above `update` of it.

    Args:
        ratio: times the first loss.
        steps: losses looked at.
        times: how many of them must be that large.
        update: of a weight's norm, that is a large step.
    """

    ratio: float = 5.0
    steps: int = 20
    times: int = 3
    update: float = 0.1
    severity: str = "critical"
    advice: str = (
        "The first steps are too large: lower the learning rate by 10 or warm it up; check the scale of inputs and "
        "targets, and that the loss is a mean, not a sum. Start again: the weights are lost by now."
    )

    is_core = False
    needs = frozenset({"loss", "batch_size", "target_min", "update_ratio", *COMPANY, *VALUES})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("ratio", self.ratio > 1, 1, "above")
        self._require("times", 1 <= self.times <= self.steps, f"{self.steps} (`steps`)", "1 to")

    def init(self) -> State:
        return {
            "first": None,
            "seen": 0,
            "high": 0,
            "since": (),
            "samples": math.inf,
            "summed": "",
            "least": math.inf,
            "update": 0.0,
            "told": False,
        }

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if not math.isfinite(record.loss) or state["seen"] > self.steps:
            return self.unjudged(record, f"judged on the first {self.steps} losses"), state
        if has_company(record):
            return self.unjudged(record, "several optimizers step in turns"), state
        samples = record.num_samples or record.scalars.get("batch_size", math.nan)
        first = record.loss if state["first"] is None else state["first"]
        limit = self.ratio * first
        state = {
            "first": first,
            "seen": state["seen"] + 1,
            "high": state["high"] + (first > 0 and record.loss > limit),
            "since": (*state["since"], record.loss) if state["since"] or record.loss > limit else (),
            "samples": min(state["samples"], samples) if math.isfinite(samples) else state["samples"],
            "summed": state["summed"] or summed_over(record),
            "least": min(state["least"], record.loss),
            "update": max(state["update"], usual_update(record)),
            "told": state["told"] or "target_min" in record.scalars,
        }
        if state["samples"] < 8 or not state["least"] > 0:
            return self.unjudged(record, "batches of fewer than eight, or a loss that is not above 0"), state
        if not state["told"] and 0 < state["update"] < self.update:
            return self.unjudged(record, "nobody said what the loss compares, and updates are small"), state
        text = f"loss {{value:.4g}}, before the first step it was {first:.4g}{state['summed']}"
        stays = median(state["since"]) > limit and not is_of(record, VALUES)
        fires = state["high"] >= self.times and record.loss > limit and stays
        return self.whole(record, fires, record.loss, limit, text), state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        return Passed(state, 0, f"judged on the first {self.steps} losses") if state["seen"] > self.steps else None


class Crawling(Rule):
    """Flags a training whose updates are all tiny while its loss creeps down: the learning rate could be far higher.

    At `judgements` measurements of updates after 100 steps: every weight's update is below `ratio` of its norm, the
    loss has fallen by less than half, and still falls by more than 1 % over 50 steps. A converged loss does not fall
    any more, and steps at which the learning rate is below half of its highest (warm-up, decay) are not judged.

    Source: a usual update is about 1e-3 of its weight (A. Karpathy).

    Args:
        ratio: norm(update) / norm(weight) that no weight exceeds.
        judgements: measurements running.
    """

    ratio: float = 2e-4
    judgements: int = 2
    advice: str = "The learning rate is too low: raise it by 10, or more, until the loss becomes noisy; then halve it."

    is_core = False
    needs = frozenset({"update_ratio", "loss"})
    low_is_worse = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("ratio", self.ratio > 0, 0, "above")
        self._require("judgements", self.judgements >= 1, 1)

    def init(self) -> State:
        return {"loss": Progress(), "levels": (), "lr": 0.0, "running": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        loss = progress(Progress(*state["loss"]), record.loss, record.num_samples)
        highest = max(state["lr"], record.lr) if math.isfinite(record.lr) else state["lr"]
        levels = state["levels"]
        if loss.seen != Progress(*state["loss"]).seen and loss.seen % 50 == 0:
            levels = (*levels[-1:], median(loss.recent))
        state = {"loss": tuple(loss), "levels": levels, "lr": highest, "running": state["running"]}
        if "update_ratio" not in record.columns or not is_effective(record) or loss.seen < 100:
            return self.unjudged(record, "no update was measured after 100 losses"), state
        ratios = record.columns["update_ratio"]
        judged = select(record.index, self.paths, min_ndim=2) & record.measured("update_ratio") & np.isfinite(ratios)
        if not judged.any() or record.lr < 0.5 * highest:
            return self.unjudged(record, "no update was measured at a full learning rate"), state
        largest = float(ratios[judged].max())
        falls = len(levels) == 2 and levels[0] - levels[1] > 0.01 * abs(levels[0])
        creeps = 0 < largest < self.ratio and loss.is_stuck(0.5) and falls
        running = state["running"] + 1 if creeps else 0
        text = f"no weight moves by more than {{value:.2g}} of its norm, loss {loss.now:.4g} from {loss.start:.4g}"
        fires = running >= self.judgements
        return self.whole(record, fires, largest, self.ratio, text), {**state, "running": running}

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if "update_ratio" in block.names or not block.has_finite_losses:
            return None
        past, levels = Progress(*state["loss"]), state["levels"]
        # A level is taken at every fiftieth loss: up to there, and on from there.
        at = 50 - past.seen % 50
        if at <= len(block):
            past = progress_over(past, block.losses[:at], block.samples[:at])
            levels = (*levels[-1:], median(past.recent))
        else:
            at = 0
        loss = progress_over(past, block.losses[at:], block.samples[at:])
        highest = max([state["lr"], *[r.lr for r in block.records if math.isfinite(r.lr)]])
        after = {"loss": tuple(loss), "levels": levels, "lr": highest, "running": state["running"]}
        return Passed(after, 0, "no update was measured after 100 losses") if len(block) <= 50 else None


_MISTAKES = (
    ("squared_error_of_pairs", "squared_error", "every prediction is compared with every target (broadcasting)"),
    ("cross_entropy_over_batch", "cross_entropy", "softmax is taken over the batch, not over the classes"),
    ("cross_entropy_twice", "cross_entropy", "softmax is applied twice"),
    ("cross_entropy", "cross_entropy_of_probabilities", "softmax outputs are given to a loss that takes logits"),
    ("binary_cross_entropy_twice", "binary_cross_entropy", "a sigmoid comes before a loss that takes logits"),
)


_MADE = {
    "loss_of_softmax": "softmax outputs are given to a loss that takes logits",
    "loss_of_sigmoid": "a sigmoid comes before a loss that takes logits",
}
"""What the graph behind a loss says of it."""


class MistakenLoss(Rule):
    """Flags a loss that follows the formula of a known mistake, and not the right one.

    From outputs and targets follow the mean squared error and the cross-entropy, and what they would be if
    predictions were broadcast against targets, softmax taken over the batch, or taken twice. What the loss has beside
    (a penalty) changes slowly: so the difference between the loss and the formula that it follows hardly varies. Losses
    that are summed where others take the mean are known, too.
    Flagged where that deviation is below `share` of the one from the right formula, which is above 1 % of the loss, and
    a small part of what the loss itself varies by. A
    softmax or sigmoid right before a loss that takes it itself is also read from the graph behind the loss.

    Args:
        share: of the deviation from the right formula.
        samples: batches measured before the first judgement.
    """

    share: float = 0.1
    samples: int = 6
    severity: str = "critical"
    for_steps: int = 2
    advice: str = (
        "Give prediction and target the same shape; take softmax over dim=-1; give logits, not probabilities, to "
        "cross_entropy (it contains the softmax) and to binary_cross_entropy_with_logits (it contains the sigmoid)."
    )

    is_core = False
    needs = frozenset({"loss", *(name for mistake in _MISTAKES for name in mistake[:2]), "output_row_sum_min", *_MADE})
    awaits = frozenset({*(name for mistake in _MISTAKES for name in mistake[:2]), *_MADE})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("share", 0 < self.share < 1, "0 and below 1", "above")
        self._require("samples", self.samples >= 3, 3)

    def init(self) -> State:
        return {"losses": (), "values": {}}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        for made, what in _MADE.items():
            if record.scalars.get(made, 0.0) > 0:
                return self.whole(record, True, 1.0, 0.0, what), state
        names = sorted({name for mistake in _MISTAKES for name in mistake[:2]} & set(record.scalars))
        if not names or not math.isfinite(record.loss):
            return self.unjudged(record, "outputs and targets are not known"), state
        losses = (*state["losses"][-31:], record.loss)
        values = {name: (*state["values"].get(name, ())[-31:], record.scalars[name]) for name in names}
        state = {"losses": losses, "values": values}
        if len(losses) < self.samples:
            return self.unjudged(record, f"fewer than {self.samples} batches were measured"), state
        scales = reductions(record)
        followed = _followed(record, losses, values, scales)
        found = [(off, right, what) for off, right, what in followed if off < self.share * right]
        if found:
            off, right, what = min(found)
            return self.whole(record, True, off, self.share * right, what), state
        return self.clear(record), state


def _followed(
    record: StepRecord, losses: Sequence[float], values: Mapping[str, Sequence[float]], scales: Mapping[str, float]
) -> Iterator[tuple[float, float, str]]:
    """Yield, for each mistake whose formula the loss follows, how far off it and the right one are, and what it is.

    What hardly varies follows nothing: the formula must explain most of what the loss varies by.
    """
    varies = float(np.std(losses))
    for mistake, right, what in _MISTAKES:
        if mistake == "cross_entropy" and not _is_softmax(record):
            continue
        off = _deviation(losses, values.get(mistake, ()), scales)
        off_right = _deviation(losses, values.get(right, ()), scales)
        if off < _EXPLAINED * varies and off_right > 0.01 * abs(median(tuple(losses))):
            yield off, off_right, what


_EXPLAINED = 0.3
"""Share of what a loss varies by that its formula may leave open."""


def _deviation(losses: Sequence[float], values: Sequence[float], scales: Mapping[str, float]) -> float:
    """Return the standard deviation of the difference, of the nearest reduction; nan where there are not as many."""
    if len(values) != len(losses) or not np.isfinite(values).all():
        return math.nan
    return min(float(np.std(np.subtract(losses, np.multiply(scale, values)))) for scale in scales.values())


def _is_softmax(record: StepRecord) -> bool:
    low, high = (record.scalars.get(f"output_row_sum_{end}", math.nan) for end in ("min", "max"))
    return abs(low - 1) < 1e-3 and abs(high - 1) < 1e-3 and record.scalars.get("output_min", -1.0) >= 0
