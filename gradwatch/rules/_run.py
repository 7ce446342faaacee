"""The run as a whole: scaler, clips, ranks, clocks, gradients that are not reset, signals that died."""

from __future__ import annotations

import math

from ..records import StepRecord
from ._block import Block, Passed
from ._findings import Findings
from ._rule import Rule, State

__all__ = [
    "AmpOverflow",
    "ClipTooOften",
    "DeadSignal",
    "GradConflict",
    "GradNotReset",
    "RankDivergence",
    "Stalled",
]


NO_BACKWARD = "no backward reached a parameter"
"""How the reason begins, on record, for a step without any gradient."""


def _share(flags: str) -> float:
    return flags.count("1") / len(flags) if flags else 0.0


class ClipTooOften(Rule):
    """Notes that more than `share` of the last `window` steps were clipped: the clip has become the learning rate.

    Args:
        share: of the steps.
        window: steps looked at.
    """

    share: float = 0.5
    window: int = 100
    severity: str = "info"
    advice: str = (
        "Raise the clip's limit, or lower the learning rate: with every step clipped only the direction counts."
    )

    is_core = False
    needs = frozenset({"treatments"})

    def init(self) -> State:
        return {"flags": ""}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if not record.treatments and "1" not in state["flags"]:
            return self.unjudged(record, "nothing is clipped"), state
        clipped = any("clip" in t.name and t.applied for t in record.treatments)
        flags = (state["flags"] + "01"[clipped])[-self.window :]
        often = len(flags) == self.window and _share(flags) > self.share
        text = f"{{value:.0%}} of the last {len(flags)} steps were clipped"
        return self.whole(record, often, _share(flags), self.share, text), {"flags": flags}

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if "1" in state["flags"] or any(record.treatments for record in block.records):
            return None
        return Passed(state, 0, "nothing is clipped")


class AmpOverflow(Rule):
    """Flags mixed precision that no longer works: the loss scale is down at `floor`, or too many steps overflow.

    A scaler finds its scale by overflowing now and then, most of all in its first steps: `share` of the last `window`
    steps, and at least 11 of them.

    Args:
        floor: loss scale that can hardly be lowered.
        share: of the steps.
        window: steps looked at.
    """

    floor: float = 1.0
    share: float = 0.05
    window: int = 200
    severity: str = "critical"
    advice: str = (
        "Gradients or activations leave the range of float16. Use bfloat16; look for the layer with the largest "
        "activations; check the loss for NaN; keep softmax, norms and losses in float32."
    )

    is_core = False
    needs = awaits = frozenset({"amp_overflow", "grad_scale"})

    def init(self) -> State:
        return {"flags": ""}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if "grad_scale" not in record.scalars and "amp_overflow" not in record.scalars:
            return self.unjudged(record, "there is no loss scaler"), state
        overflow = record.scalars.get("amp_overflow", 0.0) > 0
        flags = (state["flags"] + "01"[overflow])[-self.window :]
        state = {"flags": flags}
        scale = record.scalars.get("grad_scale", math.inf)
        if scale <= self.floor and overflow:
            return self.whole(record, True, scale, self.floor, "the loss scale is {value:.3g} and overflows"), state
        often = flags.count("1") > max(10.0, self.share * self.window)
        text = f"{flags.count('1')} of the last {len(flags)} steps overflowed"
        return self.whole(record, often, _share(flags), self.share, text), state


class GradNotReset(Rule):
    """Flags gradients that are still there when the next step's are added: `zero_grad` is not called.

    Read from the gradients themselves where gradwatch sees them before a new accumulation begins.
    """

    severity: str = "critical"
    for_steps: int = 5
    advice: str = "Call `optimizer.zero_grad()` after every optimizer step (and not between accumulated micro-batches)."

    is_core = False
    needs = awaits = frozenset({"grads_kept"})

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        kept = record.scalars.get("grads_kept", math.nan)
        if math.isnan(kept):
            return self.unjudged(record, "not measured at this step"), state
        return self.whole(record, kept > 0, kept, 0.0, "gradients of the last step were not reset"), state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        kept = block.scalar("grads_kept")
        return Passed(state, len(block)) if all(k <= 0 for k in kept) else super().pass_over(block, state)


class GradConflict(Rule):
    """Notes tasks whose gradients point against each other on more than `share` of the last `window` measurements.

    Source: T. Yu et al., "Gradient surgery for multi-task learning", NeurIPS 2020, arXiv 2001.06782.

    Args:
        share: of the measurements with a negative cosine.
        window: measurements looked at.
    """

    share: float = 0.5
    window: int = 100
    severity: str = "info"
    advice: str = 'Try gradient surgery (`surgery="pcgrad"`), or other weights for the losses.'

    is_core = False
    needs = frozenset({"task_cos"})

    def init(self) -> State:
        return {"flags": {}}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        cosines = {k[9:]: v for k, v in record.scalars.items() if k.startswith("task_cos/") and math.isfinite(v)}
        if not cosines:
            return self.unjudged(record, "there are no task gradients"), state
        flags = dict(state["flags"])
        for pair, cosine in cosines.items():
            flags[pair] = (flags.get(pair, "") + "01"[cosine < 0])[-self.window :]
        pair = max(cosines, key=lambda p: _share(flags[p]))
        often = len(flags[pair]) == self.window and _share(flags[pair]) > self.share
        names = pair.replace("/", " and ").replace("{", "{{").replace("}", "}}")
        text = names + " conflict in {value:.0%} of the steps"
        return self.whole(record, often, _share(flags[pair]), self.share, text), {"flags": flags}

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if any(name.startswith("task_cos/") for name in block.names):
            return None
        return Passed(state, 0, "there are no task gradients")


class Stalled(Rule):
    """Flags a step that came more than `seconds` after the one before.

    Args:
        seconds: between two steps.
    """

    seconds: float = 1800.0
    severity: str = "critical"
    advice: str = "A rank waits, the data loader hangs, or the disk is slow: look at the other ranks and the loader."

    is_core = False
    needs = frozenset({"seconds"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("seconds", self.seconds > 0, 0, "above")

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        seconds = record.scalars.get("seconds", math.nan)
        if math.isnan(seconds):
            return self.unjudged(record, "no clock"), state
        return self.whole(record, seconds > self.seconds, seconds, self.seconds, "{value:.0f} s without a step"), state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        seconds = block.scalar("seconds")
        return Passed(state, len(block)) if all(s <= self.seconds for s in seconds) else None


class RankDivergence(Rule):
    """Flags ranks that no longer hold the same weights or, after their reduction, the same gradients.

    Compared bit for bit, by checksums (`replicas_every`): the one rank that differs from most is named; of two it is
    the one whose weights changed between the optimizer's steps, or whose gradient is not what both brought to it. Who
    was named once is named for as long as they differ. Besides, gradient norms are compared at every step.

    Args:
        tolerance: relative spread of the gradient norms over the ranks.
    """

    tolerance: float = 1e-6
    severity: str = "critical"
    advice: str = (
        "A rank skipped a step, changed its weights alone, or its memory has flipped a bit: decide for all ranks "
        "together; restart from a checkpoint, and where it comes again on the same rank, without that device."
    )

    is_core = False
    needs = frozenset({"rank_spread", "replicas_differ", "replica_gradients_differ", "replica_rank", "replica_differs"})
    awaits = frozenset({"rank_spread", "replicas_differ"})

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        spread = record.scalars.get("rank_spread", math.nan)
        weights, gradients = (
            record.scalars.get(name, math.nan) for name in ("replicas_differ", "replica_gradients_differ")
        )
        if weights > 0 or gradients > 0:
            rank = record.scalars.get("replica_rank", -1.0)
            # What a bad gradient has made of the weights tells of two ranks no more which it was.
            rank = state.get("rank", -1.0) if rank < 0 else rank
            return self._bits(record, weights, gradients, rank), {"rank": rank}
        state = state if math.isnan(weights) else {}
        if math.isnan(spread):
            return (
                self.unjudged(record, "one rank, or not measured") if math.isnan(weights) else self.clear(record)
            ), state
        text = "the ranks' gradient norms differ by {value:.2g}"
        return self.whole(record, spread > self.tolerance, spread, self.tolerance, text), state

    def _bits(self, record: StepRecord, weights: float, gradients: float, rank: float) -> Findings:
        what = "weights" if weights > 0 else "gradients"
        text = f"the {what} of rank {rank:.0f} are not those of the other ranks, bit for bit"
        if rank < 0:
            text = f"the ranks' {what} are not the same, bit for bit ({max(weights, gradients):.0f} differ from most)"
        differs = record.columns.get("replica_differs")
        if differs is None or not (differs > 0).any():
            return self.whole(record, True, max(weights, gradients), 0.0, text)
        judged = record.measured("replica_differs")
        return self.over(record, judged & (differs > 0), judged, differs, 0.0, text)


class DeadSignal(Rule):
    """Flags a signal that stopped telling anything for `steps` steps.

    The loss is the same number while gradients change and are as large as at the beginning (a NaN replaced by 0 before
    logging looks so); or the gradient norm is zero while the loss is not near zero. A model that has converged has
    small gradients, and is not flagged. Where a loss is given and no parameter has any gradient when the optimizer
    steps, `none` steps are enough.

    Source: Hugging Face's `logging_nan_inf_filter`; the BLOOM-13B log with a gradient norm of 0.000 throughout.

    Args:
        steps: without any change.
        none: steps without any gradient.
    """

    steps: int = 200
    none: int = 20
    severity: str = "critical"
    advice: str = (
        "Check that what is logged is what is computed (a filter that hides NaN, a detached or cached value), and that "
        "gradients are there when the optimizer steps, and when gradwatch looks: no `zero_grad()` between backward and "
        "either."
    )

    enough = 20
    needs = frozenset({"loss", "grad_norm"})

    def init(self) -> State:
        return {"loss": None, "norm": None, "loss_same": 0, "norm_same": 0, "early": (), "none": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        loss, norm = record.loss, record.global_norm
        state = {**state, "none": state["none"] + 1 if _is_blank(record) else 0}
        if state["none"] >= self.none:
            text = "no parameter has a gradient when the step is measured, for {value:.0f} steps"
            return self.whole(record, True, state["none"], self.none, text), state
        if not record.has_gradient or math.isnan(norm) or record.lr == 0:
            return self.unjudged(record, "the gradient norm is unknown, or the learning rate is zero"), state
        early = state["early"] if len(state["early"]) >= 20 or not norm > 0 else (*state["early"], norm)
        loss_same = state["loss_same"] + 1 if loss == state["loss"] else 0
        norm_same = state["norm_same"] + 1 if norm == state["norm"] else 0
        seen = {"loss": loss, "norm": norm, "loss_same": loss_same, "norm_same": norm_same, "early": early}
        state = {**state, **seen}
        moving = bool(early) and norm > 1e-3 * max(early)
        if loss_same >= self.steps and moving and norm_same < self.steps:
            return self.whole(record, True, loss, loss, f"the loss is {loss:.4g} for {loss_same} steps"), state
        if norm == 0 and norm_same >= self.steps and (not record.has_loss or abs(loss) > 1e-4):
            return self.whole(record, True, norm, norm, f"the gradient norm is {norm:.4g} for {norm_same} steps"), state
        return self.clear(record), state

    def pass_over(self, block: Block, state: State) -> Passed | None:
        n = len(block)
        if max(state["loss_same"], state["norm_same"]) + n >= self.steps:
            return None
        if any(map(math.isnan, block.norms)) or any(record.lr == 0 for record in block.records):
            return None
        early, loss, norm = state["early"], state["loss"], state["norm"]
        loss_same, norm_same = state["loss_same"], state["norm_same"]
        if len(early) < 20:
            early = (*early, *[x for x in block.norms if x > 0])[:20]
        for next_loss, next_norm in zip(block.losses, block.norms, strict=True):
            loss_same = loss_same + 1 if next_loss == loss else 0
            norm_same = norm_same + 1 if next_norm == norm else 0
            loss, norm = next_loss, next_norm
        after = {"loss": loss, "norm": norm, "loss_same": loss_same, "norm_same": norm_same, "early": early, "none": 0}
        return Passed(after, n)


def _is_blank(record: StepRecord) -> bool:
    """Return whether a loss was given and no gradient was there, which no optimizer inside backward had used up."""
    return record.has_loss and not record.has_gradient and record.unseen.get("", "").startswith(NO_BACKWARD)
