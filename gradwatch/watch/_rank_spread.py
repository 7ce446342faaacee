"""How far the ranks' gradient norms are apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ..stats import At, Ranks, global_norm
from ..torchside import moved
from ._measurement import Measurement, StepView

__all__ = ["RankSpread"]


class RankSpread(Measurement):
    """Largest minus smallest gradient norm of the ranks, over the largest: above zero where they don't share gradients.

    Of gradients in pieces no rank has a norm of its own.
    """

    part = "the ranks' gradient norms"
    gives = ("rank_spread",)
    of_ranks = True

    def tables(self, ranks: Ranks) -> Mapping[str, tuple[int, ...]]:
        return {"norms": (ranks.num,)}

    def look(self, view: StepView, tables: dict[str, Tensor]) -> None:
        if view.pieces is not None and not view.pieces.shards.groups:
            tables["norms"][view.rank] = moved(global_norm(view.pieces.norms), tables["norms"].device)

    def conclude(self, found: Mapping[str, Any]) -> Mapping[str, float | At]:
        norms = found["norms"]
        if not norms.any() or not np.isfinite(norms).all():
            return {}
        return {"rank_spread": float((norms.max() - norms.min()) / norms.max())}
