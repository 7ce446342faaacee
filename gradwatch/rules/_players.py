"""Networks that play against each other: whether one of them has won, or both, which can't be."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from weakref import WeakKeyDictionary

from ..records import Index, StepRecord
from ._findings import Findings
from ._rule import Rule, State
from ._windows import TAIL, Progress, progress

__all__ = ["NoContest", "OneSided"]


class _OfTwo(Rule):
    """Judges the losses of two optimizers that step in turns, against their first levels."""

    share: float = 0.03

    is_core = False
    needs = frozenset({"loss", "optimizer", "others_loss"})
    awaits = frozenset({"others_loss"})
    low_is_worse = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("share", 0 < self.share < 1, "0 and below 1", "above")

    def init(self) -> State:
        return {"own": Progress(), "others": Progress()}


class OneSided(_OfTwo):
    """Flags an adversarial training that one side has won: the loss of one optimizer is next to nothing, and that of
    another far above where it began.

    Of losses above zero alone: a Wasserstein critic's has no such level. Judged once `TAIL` losses of each are known.

    Source: I. Goodfellow et al., "Generative adversarial networks", NeurIPS 2014, section 3: where the discriminator is
    sure of itself the generator's gradient vanishes.

    Args:
        share: of its first level that is next to nothing.
        ratio: times its first level that is far above.
    """

    share: float = 0.03
    ratio: float = 2.0
    for_steps: int = 100
    advice: str = (
        "The discriminator (critic) has won, and teaches the generator nothing any more. Lower its learning rate or "
        "its steps, or raise the generator's; add noise, label smoothing or a gradient penalty."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("ratio", self.ratio > 1, 1, "above")

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        theirs = record.scalars.get("others_loss", math.nan)
        if not (math.isfinite(theirs) and math.isfinite(record.loss)):
            return self.unjudged(record, "no optimizers step in turns, or their losses are not known"), state
        own = progress(Progress(*state["own"]), record.loss)
        others = progress(Progress(*state["others"]), theirs)
        state = {"own": tuple(own), "others": tuple(others)}
        mine, rest = _level(own), _level(others)
        if not (math.isfinite(mine) and math.isfinite(rest)):
            return self.unjudged(record, f"fewer than {TAIL} losses, or some that are not above zero"), state
        # Told once: by the side that has won.
        won = mine < self.share and rest > self.ratio
        text = (
            f"the loss of optimizer {int(record.scalars.get('optimizer', 0))} is {{value:.2g}} of its first level, the "
            f"other's is {rest:.2g} times its own: one side has won"
        )
        return self.whole(record, won, mine, self.share, text), state


class NoContest(_OfTwo):
    """Flags a generator and a discriminator that both win: the losses of two optimizers in turns are next to nothing.

    What one of them gains the other loses, unless a sign or a label is wrong. The networks are known by their names
    (`generator`, `netG`, `disc`, `critic`, ...): others that are trained in turns may well both be done. Of losses
    above zero alone, once `TAIL` losses of each are known.

    Args:
        share: of its first level that is next to nothing.
    """

    share: float = 0.03
    severity: str = "critical"
    for_steps: int = 50
    advice: str = (
        "Generator and discriminator do not play against each other: a sign or a label is wrong. The discriminator is "
        "to tell real samples (label 1) from generated ones (label 0), and the generator's loss asks it for label 1 of "
        "the latter."
    )

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        theirs = record.scalars.get("others_loss", math.nan)
        if not (math.isfinite(theirs) and math.isfinite(record.loss) and _are_players(record.index)):
            return self.unjudged(record, "no generator and discriminator step in turns, or a loss is not known"), state
        first = int(record.scalars.get("optimizer", 0)) == 0
        losses = (record.loss, theirs) if first else (theirs, record.loss)
        own, others = (progress(Progress(*state[k]), v) for k, v in zip(("own", "others"), losses, strict=True))
        state = {"own": tuple(own), "others": tuple(others)}
        if not first:
            return self.unjudged(record, "told once, at the steps of the first of them"), state
        levels = _level(own), _level(others)
        if not all(map(math.isfinite, levels)):
            return self.unjudged(record, f"fewer than {TAIL} losses, or some that are not above zero"), state
        text = "the losses of both are next to nothing: the larger is {value:.2g} of its first level"
        return self.whole(record, max(levels) < self.share, max(levels), self.share, text), state


_GENERATOR = re.compile(r"(net_?)?g|gen(erator)?s?|(g|gen)_?net(work)?|gen_\w+", re.IGNORECASE)
_DISCRIMINATOR = re.compile(
    r"(net_?)?d|dis|disc(riminator)?s?|critics?|(d|dis|disc)_?net(work)?|disc_\w+", re.IGNORECASE
)


_KNOWN: WeakKeyDictionary[Index, bool] = WeakKeyDictionary()


def _are_players(index: Index) -> bool:
    if index not in _KNOWN:
        parts = {part for path in index.paths for part in path.split(".")}
        _KNOWN[index] = _is_any(_GENERATOR, parts) and _is_any(_DISCRIMINATOR, parts)
    return _KNOWN[index]


def _is_any(name: re.Pattern[str], parts: Iterable[str]) -> bool:
    return any(name.fullmatch(part) for part in parts)


def _level(loss: Progress) -> float:
    """Return the present loss over the first one; nan where it is not known, or was not above zero."""
    if loss.seen < TAIL or not min(*loss.first, *loss.recent) > 0:
        return math.nan
    return loss.now / loss.start
