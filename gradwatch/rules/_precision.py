"""What narrow number formats lose of a training."""

from __future__ import annotations

import numpy as np

from ..records import StepRecord
from ._findings import Findings
from ._rule import Rule, State
from ._selection import select
from ._updates import is_effective

__all__ = ["UpdatesRoundedAway"]


class UpdatesRoundedAway(Rule):
    """Flags weights in 16 bits of which the step leaves most as they were, though they have a gradient.

    An update below half of the distance between two neighbouring numbers is rounded away: in bfloat16 what is less than
    about 1/500 of the weight. Judged where, over all weights, more than `share` of the entries with a gradient did not
    move; those weights are named for which that is so.

    Source: Zamirai et al., "Revisiting BFloat16 Training", 2020, arXiv 2010.06192.

    Args:
        share: of the entries.
    """

    share: float = 0.5
    for_steps: int = 20
    advice: str = (
        "Keep master weights in float32 (autocast on a float32 model, or an optimizer that holds copies); or round at "
        "random (stochastic rounding), or carry what was lost over to the next step (Kahan summation). A larger "
        "learning rate loses less."
    )

    is_core = False
    needs = frozenset({"update_lost", "lr"})
    awaits = frozenset({"update_lost"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("share", 0 < self.share < 1, "0 and below 1", "above")

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        if "update_lost" not in record.columns or not is_effective(record):
            return self.unjudged(record, "no update of weights in 16 bits was measured"), state
        index, lost = record.index, record.columns["update_lost"]
        judged = select(index, self.paths, min_ndim=2) & record.measured("update_lost")
        if not judged.any():
            return self.unjudged(record, "no weight in 16 bits had a gradient"), state
        whole = float(np.average(lost[judged], weights=index.numel[judged]))
        over = judged & (lost > self.share) & (whole > self.share)
        text = f"the step leaves {{value:.0%}} of its entries as they were; of all weights {whole:.0%}"
        return self.over(record, over, judged, lost, self.share, text), state
