"""Attention that goes out of hand: logits that grow, heads that look at one place, scores that drift."""

from __future__ import annotations

import math

import numpy as np

from ..records import StepRecord
from ._findings import Findings
from ._rule import Rule, State
from ._selection import select
from ._windows import median, push

__all__ = ["AttentionEntropyCollapse", "AttentionLogitsGrowing", "LogitsDrift"]

_KEPT = 16
"""Measurements of a level that are remembered."""


class AttentionLogitsGrowing(Rule):
    """Flags attention whose largest logit is above `max_logit`, or above half of it and twice what it was lately.

    Lately is the median of the last measurements before this one, `window` at the most. A softmax of such logits is
    all but an argmax; in half precision their last digits are lost, and the loss spikes some hundred steps later.

    Source: the limit of QK-Clip (Kimi K2, arXiv 2507.20534, section 2.1); growing logits as what comes before a loss
    that diverges: Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities", arXiv
    2309.14322.

    Args:
        max_logit: of any head.
        window: measurements.
    """

    max_logit: float = 100.0
    window: int = 8
    advice: str = (
        "Clip queries and keys by head (`gradwatch.treatments.QKClip`), or normalise them (QK-norm); lower the "
        "learning rate, lengthen its warm-up, or add weight decay to the projections of queries and keys."
    )

    is_core = False
    needs = frozenset({"attention_logit_max"})
    awaits = frozenset({"attention_logit_max"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("max_logit", self.max_logit > 0, 0, "above")
        self._require("window", self.window >= 2, 2)

    def init(self) -> State:
        return {"per_path": {}, "seen": 0}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if "attention_logit_max" not in record.columns:
            return self.unjudged(record, "no attention was measured"), state
        logits = record.columns["attention_logit_max"]
        judged = select(record.index, self.paths, "module") & record.measured("attention_logit_max")
        past = [values for name, values in sorted(state["per_path"].items()) if name.startswith("at_")]
        usual = np.full(len(logits), np.inf)
        if len(past) >= 2:
            with np.errstate(invalid="ignore"):
                known = ~np.isnan(np.stack(past)).any(axis=0)
                usual = np.where(known, np.median(np.stack(past), axis=0), np.inf)
        grows = (logits > self.max_logit / 2) & (logits > 2 * usual)
        over = judged & ((logits > self.max_logit) | grows | np.isposinf(logits))
        seen = state["seen"] + 1
        place = f"at_{state['seen'] % self.window}"
        state = {"seen": seen, "per_path": {**state["per_path"], place: np.where(judged, logits, np.nan)}}
        is_over = bool((logits[over] > self.max_logit).any())
        limits = np.where(logits > self.max_logit, self.max_logit, np.minimum(2 * usual, self.max_logit))
        text = (
            "largest attention logit {value:.3g}, "
            + ("limit" if is_over else "twice its recent level is")
            + " {limit:.3g}"
        )
        return self.over(record, over, judged, logits, limits, text), state


class AttentionEntropyCollapse(Rule):
    """Flags attention whose heads together have come to look at next to nothing but one place each.

    The entropy over all heads of a module was above `start` of what it can be, is below `share` of it now, and the loss
    is not better than when it was last above: heads of sharp patterns are usual, all heads of a module at once are not.

    Source: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", ICML 2023, arXiv
    2303.06296.

    Args:
        share: of the entropy that is too low.
        start: that it must have had.
        better: share of the loss by which it must have fallen since, to be better.
    """

    share: float = 0.02
    start: float = 0.2
    better: float = 0.1
    for_steps: int = 2
    advice: str = (
        "Queries and keys have grown until the softmax is an argmax, through which no gradient comes back. Lower the "
        "learning rate, lengthen its warm-up, normalise queries and keys (QK-norm, sigma-reparametrisation), or clip "
        "them by head (`gradwatch.treatments.QKClip`)."
    )

    is_core = False
    low_is_worse = True
    needs = frozenset({"attention_entropy", "loss"})
    awaits = frozenset({"attention_entropy"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("share", 0 < self.share < self.start, "0 and below `start`", "above")
        self._require("start", self.start < 1, 1, "below")
        self._require("better", 0 <= self.better < 1, "0 and below 1")

    def init(self) -> State:
        return {"per_path": {}, "losses": ()}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if "attention_entropy" not in record.columns:
            return self.unjudged(record, "no attention was measured"), state
        losses = push(state["losses"], record.loss, 3)
        if not losses:
            return self.unjudged(record, "no loss is known"), state
        loss, n = median(losses), len(record.index)
        shares = record.columns["attention_entropy"]
        judged = select(record.index, self.paths, "module") & record.measured("attention_entropy")
        past = state["per_path"]
        highest = np.fmax(past.get("highest", np.full(n, np.nan)), np.where(judged, shares, np.nan))
        before = np.where(judged & (shares > self.share), loss, past.get("before", np.full(n, np.nan)))
        collapsed = judged & (shares <= self.share) & (highest > self.start)
        collapsed &= loss > before - self.better * np.abs(before)
        state = {"per_path": {"highest": highest, "before": before}, "losses": losses}
        text = f"its heads' entropy is {{value:.2g}} of what it can be, limit {{limit:.2g}}; the loss is {loss:.3g}"
        return self.over(record, collapsed, judged, shares, self.share, text), state


class LogitsDrift(Rule):
    """Flags scores of classes that drift away from 0: log Z, the logarithm of the sum of their exponentials, is further
    than `far` from that of scores of 0, and at twice the distance of half as many measurements ago.

    A softmax does not change when all scores of a row move alike, so nothing holds them; in half precision scores of 30
    and more are told apart by steps of 0.1 and more, and the loss that they give is one of rounded scores.

    Source: the z-loss of PaLM (Chowdhery et al., arXiv 2204.02311, section 5); output logits that diverge: Wortsman et
    al., arXiv 2309.14322.

    Args:
        far: distance of log Z from the logarithm of the number of classes.
    """

    far: float = 30.0
    for_steps: int = 2
    advice: str = (
        "Add a z-loss, 1e-4 times the square of log Z; or weight decay on the last layer. Compute the loss from scores "
        "in float32."
    )

    is_core = False
    needs = frozenset({"output_log_z", "num_classes"})
    awaits = frozenset({"output_log_z"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("far", self.far > 0, 0, "above")

    def init(self) -> State:
        return {"distances": ()}

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        log_z, classes = (record.scalars.get(name, math.nan) for name in ("output_log_z", "num_classes"))
        if math.isnan(log_z) or not classes >= 2:
            return self.unjudged(record, "no scores of classes were seen"), state
        distance = abs(log_z - math.log(classes))
        distances = push(state["distances"], distance, _KEPT)
        if len(distances) < 4:
            return self.unjudged(record, "fewer than four measurements"), {"distances": distances}
        earlier = median(distances[: len(distances) // 2])
        drifts = distance > self.far and distance > 2 * earlier
        text = f"log Z of the scores is {log_z:.4g}, {{value:.3g}} from that of scores of 0; it was {earlier:.3g}"
        return self.whole(record, drifts, distance, self.far, text), {"distances": distances}
