"""The user's own statistics of what a step does to the parameters: asked when the optimizers have stepped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..protocols import Statistic
from ..stats import At, Number, Shards
from ..torchside import Aside, largest_piece, wide_dtype
from ._finished import asked, finished
from ._measurement import Measurement, StepView
from ._model_meter import ModelMeter, as_held
from ._views import Views

__all__ = ["OwnUpdates", "own_updates"]


class _Kept(NamedTuple):
    """What waits for the optimizers' step.

    Attributes:
        view: of the step.
        params: as they are held; their updates are asked for.
        copies: of the pieces on this rank; None where it has nothing to say.
    """

    view: StepView
    params: Sequence[Tensor]
    copies: Sequence[Tensor] | None


class OwnUpdates(Measurement):
    """Keeps copies of the parameters for one statistic, within a fourth of the memory limit, and finishes it.

    Of parameters in pieces every rank takes part, like `Updates`.

    Args:
        meter: of the model.
        statistic: that needs updates.
        views: makes what it is shown.
    """

    spans_step = True

    def __init__(self, meter: ModelMeter, statistic: Statistic, views: Views) -> None:
        super().__init__(meter)
        self.name, self.every = statistic.name, statistic.every
        self.part = f"statistic {statistic.name!r}"
        self._statistic, self._views = statistic, views
        self._kept: _Kept | None = None
        self._is_too_large = False

    def before_step(self, view: StepView, *, moves: bool) -> None:
        params = as_held(view.gradients.params)
        room = self.meter.options.memory_limit_bytes // 4
        self._is_too_large = sum(largest_piece(p) * p.element_size() for p in params) > room
        shards = Shards([p.detach() for p in params], params)
        if self._is_too_large or not params or not (moves or shards.groups):
            return
        # First with nothing to say: that is how it takes part where a copy fails.
        self._kept = _Kept(view, params, None)
        if not moves:
            return
        with Aside():
            self._kept = _Kept(view, params, [piece.detach().clone() for piece in shards.locals])

    def after_step(self) -> Mapping[str, Number] | None:
        kept, self._kept = self._kept, None
        if kept is None:
            return None
        statistic, n = self._statistic, len(kept.params)
        shards = Shards([p.detach() for p in kept.params], kept.params)
        device = self.meter.device
        wide = wide_dtype(device)
        # The last sum counts ranks that have nothing to say.
        rows = torch.zeros(n, statistic.num_sums + 1, dtype=wide, device=device)
        maxima = torch.full((n, statistic.num_maxima), -torch.inf, dtype=wide, device=device)
        rows[:, -1] = 1.0
        try:
            if kept.copies is not None:
                with Aside():
                    found = asked(statistic, self._views.after(statistic, kept.view, kept.copies, shards.locals), n)
                if any(x is not None for x in found):
                    rows[:, -1] = 0.0
                for into, x in zip((rows[:, :-1], maxima), found, strict=True):
                    if x is not None:
                        into.copy_(x)
        finally:
            # Also where that failed: the other ranks wait.
            shards.sum_(rows)
            if statistic.num_maxima:
                shards.max_(maxima)
        return {"sums": rows, "maxima": maxima, "places": self.meter.positions(kept.view.gradients.params)}

    def conclude(self, found: Mapping[str, Any]) -> Mapping[str, float | At]:
        had = found["measured"][found["places"]] if "measured" in found else slice(None)
        sums, maxima, places = found["sums"][had], found["maxima"][had], found["places"][had]
        if not len(sums) or sums[:, -1].any():
            return {}
        return finished(self._statistic, sums[:, :-1], maxima, places, self.meter.watched.index.paths)

    def drop(self) -> None:
        self._kept = None

    def follow(self) -> None:
        self.drop()

    def notes(self) -> list[str]:
        why = f"{self.part} is not measured: copies of the parameters take more than a fourth of `memory_limit_mb`"
        return [why] if self._is_too_large else []

    def close(self) -> None:
        self.drop()


def own_updates(statistics: Sequence[Statistic], meter: ModelMeter, views: Views) -> list[OwnUpdates]:
    """Return what measures those that need updates."""
    return [OwnUpdates(meter, s, views) for s in statistics if "updates" in s.needs]
