"""What the loss itself shows: jumps, a way up, a bad beginning, an end too early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from ..records import StepRecord
from ._block import Block, Passed
from ._company import COMPANY, has_company
from ._findings import Findings
from ._kinds import VALUES, is_of
from ._reductions import summed_over
from ._rule import Rule, State
from ._windows import TAIL, Ordered, Progress, level, median, progress, progress_over, push

__all__ = ["BadInitialLoss", "Diverging", "LossSpike", "Undertrained"]


class LossSpike(Rule):
    """Flags a loss that jumps again and again: `spikes` of the last `of` losses have z > `z`.

    z is robust and not on the log, so that negative losses work: (loss - median) / (1.4826 MAD) over the last `window`
    losses that were no spikes, with a floor of 2 % of the median and 1 % of the first level under the deviation. A
    spike is also larger than all losses of the 500 steps before the last `of`: batches with label outliers come back
    with the same height. One outlier among the batches is no alarm; `spikes=1` reports each.

    Source: OLMo's and llm.c's z-scores, with flagged values left out of the window (theirs raise their own bar).

    Args:
        z: deviations above the median.
        spikes, of: how many of the last losses must be spikes.
        window: losses remembered.
        min_samples: losses needed before any is a spike.
    """

    z: float = 10.0
    spikes: int = 3
    of: int = 10
    window: int = 128
    min_samples: int = 64
    advice: str = (
        "Usually bad batches or a learning rate at the edge. Look at the batches of these steps; skip them "
        "(`then: [skip_step]`); lower the learning rate; clip gradients."
    )

    is_core = False
    needs = frozenset({"loss"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("z", self.z > 0, 0, "above")
        self._require("spikes", 1 <= self.spikes <= self.of, f"{self.of} (`of`)", "1 to")
        self._require("min_samples", 4 <= self.min_samples <= self.window, f"{self.window} (`window`)", "4 to")

    @property
    def reach(self) -> int:
        return self.of - 1 if self.spikes > 1 else 0

    def init(self) -> State:
        return {"window": (), "start": (), "flags": (), "rejected": (), "tail": (), "highest": ()}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        loss, window = record.loss, state["window"]
        if not math.isfinite(loss):
            return self.unjudged(record, "no finite loss was given"), state
        start = state["start"] if len(state["start"]) >= 5 else (*state["start"], loss)
        before = max(state["highest"], default=-math.inf)
        state = {**state, "start": start, **self._heights(loss, state)}
        if len(window) < self.min_samples:
            return self.unjudged(record, "too few losses seen"), {**state, "window": push(window, loss, self.window)}
        center, sigma, _ = level(window, self._floor(median(window), start))
        outlier = loss > center + self.z * sigma
        limit = max(center + self.z * sigma, before)
        spike = loss > limit
        flags = (*state["flags"], spike)[-self.of :]
        rejected = (*state["rejected"], loss) if outlier else ()
        if not outlier:
            window = push(window, loss, self.window)
        elif len(rejected) >= self.min_samples:
            window, rejected = rejected, ()
        state = {**state, "window": window, "flags": flags, "rejected": rejected}
        fires = spike and sum(flags) >= self.spikes
        text = f"loss {{value:.4g}}, {sum(flags)} of {len(flags)} above {{limit:.4g}}"
        return self.whole(record, fires, loss, limit, text), state

    @staticmethod
    def _floor(center: float, start: Sequence[float]) -> float:
        return max(0.02 * abs(center), 0.01 * abs(median(tuple(start))), 1e-12)

    def pass_over(self, block: Block, state: State) -> Passed | None:
        window = state["window"]
        if (
            len(window) < self.min_samples
            or not block.has_finite_losses
            or state["rejected"]
            or len(state["start"]) < 5
        ):
            return None
        ordered, after = Ordered(window), state
        for n, loss in enumerate(block.losses):
            center, sigma, _ = ordered.level(self._floor(ordered.median, state["start"]))
            if loss > center + self.z * sigma:
                return None
            after = {**after, **self._heights(loss, after)}
            past = n - self.window + len(window)
            ordered.replace(
                (window[past] if past < len(window) else block.losses[past - len(window)]) if past >= 0 else None, loss
            )
        flags = (*state["flags"], *[False] * len(block))[-self.of :]
        window = (*window, *block.losses)[-self.window :]
        return Passed({**after, "window": window, "flags": flags}, len(block))

    def _heights(self, loss: float, state: State) -> State:
        """Return the last `of` losses, and the maxima of eight blocks of 64 before them, the last one growing."""
        tail, highest = (*state["tail"], loss), state["highest"]
        if len(tail) <= self.of:
            return {"tail": tail, "highest": highest}
        seen = state.get("seen", 0)
        highest = (*highest[-7:], tail[0]) if seen % 64 == 0 else (*highest[:-1], max(highest[-1], tail[0]))
        return {"tail": tail[1:], "highest": highest, "seen": seen + 1}


class Diverging(Rule):
    """Flags a loss on its way up, or down without bound.

    Up: the lower quartile of its last `span` values lies above its own minimum by more than the minimum's size, and
    above the first level by more than half of that. Both are differences, so negative losses work, and a quartile:
    when training diverges even the easy batches get worse, and outliers don't count. Losses that balance each other (a
    generator's against its critic's) rise too, but without their gradients: so, up to 10 times the first level, the
    gradient norm must be 5 times that of the first steps, and beyond it too where several optimizers step in turns.
    Values that are learned from themselves (reinforcement learning, target networks) grow, and the error with them: not
    judged, nor where the targets were seen to grow as the errors did.

    Down: a loss whose targets are classes (indices, or rows that sum to 1) has fallen below -10 times its first level
    or -10: no cross-entropy does that, so its sign is wrong; the same where predictions of numbers are still bad ones.

    Args:
        span: losses the quartile is of.
    """

    span: int = 20
    severity: str = "critical"
    for_steps: int = 20
    advice: str = (
        "Usually the learning rate is too high, or the sign of the loss is wrong. Lower the learning rate by 3 to 10 "
        "(`then: [lower_learning_rate]`), add warm-up, clip gradients; check that the loss is what is to be minimised."
    )

    enough = 1
    needs = frozenset(
        {
            "loss",
            "grad_norm",
            "target_is_integer",
            "target_row_sum_min",
            "target_row_sum_max",
            "squared_error",
            "target_variance",
            "target_min",
            "target_max",
            *COMPANY,
            *VALUES,
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("span", 1 <= self.span <= TAIL, TAIL, "1 to")

    @property
    def reach(self) -> int:
        return self.span - 1

    def init(self) -> State:
        return {
            "loss": Progress(),
            "least": math.inf,
            "classes": False,
            "early": (),
            "norms": (),
            "wrong": False,
            "size": (0.0, 0.0),
            "jump": (),
        }

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if not math.isfinite(record.loss):
            return self.unjudged(record, "no finite loss was given"), state
        jump = _jump(record, Progress(*state["loss"]), state["jump"])
        loss = progress(Progress(*state["loss"]), record.loss, record.num_samples)
        now = sorted(loss.recent[-self.span :])[min(self.span, len(loss.recent)) // 4]
        least = min(state["least"], now) if loss.seen >= self.span else math.inf
        classes = state["classes"] or _has_class_targets(record)
        wrong = _is_wrong(record) or (state["wrong"] and "squared_error" not in record.scalars)
        norm, early = record.global_norm, state["early"]
        norms = state["norms"]
        if record.has_gradient:
            early = push(early, norm, 20) if len(early) < 20 else early
            norms = push(norms, norm, 20)
        state = {
            "loss": tuple(loss),
            "least": least,
            "classes": classes,
            "early": early,
            "norms": norms,
            "wrong": wrong,
            "size": _sizes(record, state["size"]),
            "jump": jump,
        }
        if loss.seen < 30:
            return self.unjudged(record, "fewer than 30 losses"), state
        start = loss.start
        lowest = -10 * max(1.0, abs(start))
        if (classes or wrong) and now < lowest:
            return self.whole(record, True, now, lowest, "loss {value:.4g}, far below zero: a sign is wrong"), state
        limit = max(least + abs(least), start + 0.5 * abs(start))
        text = f"loss {{value:.4g}}, it began at {start:.4g} and was {least:.4g}{_after(jump)}"
        grown = not early or not median(norms) < 5 * median(early)
        # Where others step in between the level is theirs to move: both must hold.
        far = now > start + 9 * abs(start)
        far = far and grown if has_company(record) else far or grown
        grows = is_of(record, VALUES) or _grew(state["size"], now / abs(start) if start else math.inf)
        return self.whole(record, now > limit and far and not grows, now, limit, text), state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        past = Progress(*state["loss"])
        first = past.first
        # The first losses must be known, and be a level to compare with.
        if past.seen < 30 or not block.has_finite_losses or median(first) > 5 * first[0] > 0:
            return None
        jump = state["jump"]
        if (jump and not jump[3]) or (not jump and _may_jump((past.recent[-1], *block.losses))):
            return None
        classes = state["classes"] or any(_has_class_targets(record) for record in block.records)
        wrong = state["wrong"]
        for record in block.records:
            wrong = _is_wrong(record) or (wrong and "squared_error" not in record.scalars)
        start, least = median(first), state["least"]
        tail = past.recent[-self.span :]
        ordered = Ordered(tail)
        for n, value in enumerate(block.losses):
            old = None if len(ordered.values) < self.span else (*tail, *block.losses)[n]
            ordered.replace(old, value)
            now = ordered.values[len(ordered.values) // 4]
            least = min(least, now)
            risen = now > max(least + abs(least), start + 0.5 * abs(start))
            if risen or now < -10 * max(1.0, abs(start)):
                return None
        norms = [norm for norm in block.norms if math.isfinite(norm)]
        early = (*state["early"], *norms)[:20]
        loss = progress_over(past, block.losses, block.samples)
        recent = (*state["norms"], *norms)[-20:]
        size = state["size"]
        for record in block.records:
            size = _sizes(record, size)
        known = {"classes": classes, "early": early, "norms": recent, "wrong": wrong, "size": size}
        known["jump"] = jump
        return Passed({"loss": tuple(loss), "least": least, **known}, len(block))


_JUMP = 100.0
"""Times the median of the last losses that one batch's is, where something is wrong with that batch."""
_FEW = 3
"""Losses without which none is usual."""


def _jump(record: StepRecord, past: Progress, known: tuple[float, ...]) -> tuple[float, ...]:
    """Return step and size of the first single loss that was far above all before, how many times their median it was,
    and whether one of a hundredth came after (1.0): it was the batch then, not the weights. () where there was none.
    """
    if known:
        return (*known[:3], max(known[3], float(record.loss < known[1] / _JUMP)))
    usual = median(past.recent[-10:])
    if past.seen < _FEW or not record.loss > _JUMP * abs(usual) or not record.loss > 10 * max(past.recent):
        return ()
    return (float(record.step), record.loss, record.loss / abs(usual) if usual else math.inf, 0.0)


def _may_jump(losses: Sequence[float]) -> bool:
    """Return whether any of these but the first may be far above all before it."""
    return any(later > 10 * earlier and later > 0 for earlier, later in pairwise(losses))


def _after(jump: tuple[float, ...]) -> str:
    """Return what a rise came after, as a phrase."""
    if not (jump and jump[3]):
        return ""
    return (
        f"; at step {jump[0]:.0f} one batch had {jump[2]:.3g} times the usual loss: look at its targets (a bad batch, "
        "an outlier among the labels)"
    )


def _sizes(record: StepRecord, sizes: tuple[float, float]) -> tuple[float, float]:
    """Return the first size of numbers to be predicted, and the present one; 0 where there are none."""
    low, high = (record.scalars.get(f"target_{end}", math.nan) for end in ("min", "max"))
    size = max(abs(low), abs(high))
    if not math.isfinite(size) or "squared_error" not in record.scalars:
        return sizes
    return sizes[0] or size, size


def _grew(sizes: tuple[float, float], times: float) -> bool:
    """Return whether the targets have grown as errors do that are `times` the first ones: by its root at least."""
    return sizes[0] > 0 and sizes[1] > sizes[0] * max(2.0, math.sqrt(max(times, 1.0)))


def _is_wrong(record: StepRecord) -> bool:
    """Return whether predictions of numbers are known to be bad ones."""
    variance = record.scalars.get("target_variance", math.nan)
    return variance > 0 and record.scalars.get("squared_error", math.nan) > 0.5 * variance


def _has_class_targets(record: StepRecord) -> bool:
    scalars = record.scalars
    if scalars.get("num_classes", 0) > 1:
        return True
    low, high = scalars.get("target_row_sum_min", math.nan), scalars.get("target_row_sum_max", math.nan)
    return abs(low - 1) < 1e-3 and abs(high - 1) < 1e-3 and scalars.get("target_min", -1) >= 0


class BadInitialLoss(Rule):
    """Flags a first loss far above that of a uniform guess: more than `ratio` times ln k for k classes, or ln 2 where
    it is a binary cross-entropy.

    Where it is the batch's size times that, it is a sum instead of a mean, and that is said. Of a loss of several terms
    the cross-entropy is compared, where outputs and targets are known.

    Source: A. Karpathy, "A recipe for training neural networks" (verify loss at init).

    Args:
        ratio: times ln k.
    """

    ratio: float = 3.0
    advice: str = (
        "The last layer starts too large, the inputs are not normalised, or the loss is summed instead of averaged. "
        "Start the last layer smaller; set its bias to the class frequencies."
    )

    is_core = False
    needs = frozenset(
        {"loss", "expected_initial_loss", "cross_entropy", "binary_cross_entropy", "batch_size", "output_units"}
    )
    awaits = frozenset({"expected_initial_loss", "binary_cross_entropy"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("ratio", self.ratio > 1, 1, "above")

    def init(self) -> State:
        return {"done": False}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        expected = record.scalars.get("expected_initial_loss", _of_two(record))
        if state["done"]:
            return self.clear(record), state
        if not (math.isfinite(record.loss) and math.isfinite(expected)):
            return self.unjudged(record, "the number of classes is not known"), state
        limit = self.ratio * expected
        summed = summed_over(record)
        # Of a sum of several terms the cross-entropy alone has that level.
        value = record.loss if summed else record.scalars.get("cross_entropy", record.loss)
        text = f"first loss {{value:.4g}}, a uniform guess has {expected:.4g}{summed}"
        return self.whole(record, value > limit, value, limit, text), {"done": True}

    def pass_over(self, block: Block, state: State) -> Passed | None:
        return Passed(state, len(block)) if state["done"] else super().pass_over(block, state)


def _of_two(record: StepRecord) -> float:
    """Return what a guess between two has, where the loss is a binary cross-entropy; else nan."""
    value = record.scalars.get("binary_cross_entropy", math.nan)
    return math.log(2) if abs(record.loss - value) <= 0.01 * abs(value) else math.nan


class Undertrained(Rule):
    """Notes, at the end of the run, a loss that was still falling.

    The last tenth brought more than `share` of the whole fall, and the loss is still above 30 % of its first level.

    Args:
        share: of the whole fall, in the last tenth of the steps.
    """

    share: float = 0.05
    severity: str = "info"
    advice: str = "The run was too short or the learning rate too low: train longer, or raise the learning rate."

    is_core = False
    needs = frozenset({"loss", "end_of_run"})

    def init(self) -> State:
        return {"loss": Progress(), "kept": (), "stride": 1}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        state = remember(record.loss, state, record.num_samples)
        if not record.scalars.get("end_of_run", 0.0) > 0:
            return self.unjudged(record, "judged at the end of the run"), state
        loss, kept = Progress(*state["loss"]), state["kept"]
        if loss.seen < 30 or len(kept) < 20:
            return self.unjudged(record, "fewer than 30 losses"), state
        tenth = max(5, len(kept) // 10)
        now, before = median(kept[-tenth:]), median(kept[-2 * tenth : -tenth])
        fall = loss.start - now
        falling = before - now > self.share * fall > 0 and now > loss.start - 0.7 * abs(loss.start)
        text = "loss {value:.4g} at the end, still falling"
        return self.whole(record, falling, now, before, text), state


KEEP = 512


def remember(value: float, state: State, samples: int = 0) -> State:
    """Return a state with "loss" (Progress) and "kept": every `stride`-th loss, whose stride doubles in time."""
    if not math.isfinite(value):
        return state
    loss = progress(Progress(*state["loss"]), value, samples)
    kept, stride = state["kept"], state["stride"]
    if loss.seen % stride == 0:
        kept = (*kept, value)
    if len(kept) >= KEEP:
        kept, stride = kept[::2], stride * 2
    return {**state, "loss": tuple(loss), "kept": kept, "stride": stride}


def remember_over(values: Sequence[float], state: State, samples: Sequence[int]) -> State:
    """Return what `remember` leaves after each of these finite losses in turn."""
    past, kept, stride = Progress(*state["loss"]), list(state["kept"]), state["stride"]
    for seen, value in enumerate(values, past.seen + 1):
        if seen % stride == 0:
            kept.append(value)
        if len(kept) >= KEEP:
            kept, stride = kept[::2], stride * 2
    loss = progress_over(past, values, samples)
    return {**state, "loss": tuple(loss), "kept": tuple(kept), "stride": stride}
