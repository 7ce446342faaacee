"""How far the optimizers' step moves each parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._text import listed
from ..stats import At, Number, UpdateMeter
from ._measurement import Measurement, StepView
from ._model_meter import ModelMeter, as_held
from ._options import MeasureOptions

__all__ = ["Updates"]

_ESTIMATES = (
    "update ratios of large parameters are estimates, from samples of their elements: copies of all do not fit "
    "in `memory_limit_mb`; `update_error` on the record is their largest relative standard error"
)


class Updates(Measurement):
    """Norms of updates and of parameters before them, and their ratio; the share of updates that was rounded away.

    See `gradwatch.stats.UpdateMeter`, which keeps the copies: for half the memory limit.
    """

    part = "update ratios"
    gives = ("update_norm", "param_norm", "update_ratio", "update_lost", "update_error")
    spans_step = True

    def __init__(self, meter: ModelMeter) -> None:
        super().__init__(meter)
        self.every = meter.options.updates_every or 1
        self._updates: UpdateMeter | None = None
        self._places: NDArray[np.int64] = np.zeros(0, np.int64)
        self._is_open = False

    @classmethod
    def is_on(cls, options: MeasureOptions) -> bool:
        return options.updates_every is not None

    def before_step(self, view: StepView, *, moves: bool) -> None:
        params = view.gradients.params
        if not params:
            return
        places = self.meter.positions(params)
        if self._updates is None or not np.array_equal(self._places, places):
            self._updates = UpdateMeter(as_held(params), self.meter.options.memory_limit_bytes // 2)
            self._places = places
        if moves or self._updates.in_pieces:
            self._is_open = True
            self._updates.before(blank=not moves)

    def after_step(self) -> Mapping[str, Number] | None:
        if self._updates is None or not self._is_open:
            return None
        self._is_open = False
        stats = self._updates.after()
        # Not kept for the next time: forward and backward, where memory is short, come before it.
        self._updates.release(soon_again=self.every == 1)
        places = self._places[np.asarray(stats.positions, np.int64)]
        known: dict[str, Number] = {"places": places, "numel": self.meter.watched.index.numel[places]}
        if stats.both is not None:
            return known | {"both": stats.both}
        known |= {"update": stats.update_norms, "param": stats.param_norms}
        if stats.errors is not None:
            known["error"] = stats.errors
        if stats.lost is not None and stats.given is not None:
            known |= {"lost": stats.lost, "given": stats.given}
        return known

    def conclude(self, found: Mapping[str, Any]) -> Mapping[str, float | At]:
        """The ratio's denominator has a floor of 1e-8 root mean square, so that a parameter at zero gives a large
        number and not inf."""
        both = found.get("both")
        update, norm = (found["update"], found["param"]) if both is None else both
        if (update < 0).any():
            return {}  # some rank did not step
        # What turned out to have no gradient was not moved by the optimizer either.
        had = found["measured"][found["places"]] if "measured" in found else slice(None)
        places, numel = found["places"][had], found["numel"][had].astype(np.float64)
        update, norm = update[had], norm[had]
        ratio = update / np.maximum(norm, 1e-8 * np.sqrt(np.maximum(numel, 1)))
        told: dict[str, float | At] = {
            "update_norm": At(places, update),
            "param_norm": At(places, norm),
            "update_ratio": At(places, ratio),
        }
        if "given" in found:
            lost, given = found["lost"][had], found["given"][had]
            some = given > 0
            told["update_lost"] = At(places[some], lost[some] / given[some])
        if "error" in found:
            told["update_error"] = float(found["error"][had].max(initial=0.0))
        return told

    def drop(self) -> None:
        if self._updates is not None and self._is_open:
            self._updates.release()
        self._is_open = False

    def follow(self) -> None:
        self.drop()
        self._updates = None

    def notes(self) -> list[str]:
        if self._updates is None:
            return []
        paths = self.meter.watched.index.paths
        left_out = [paths[self._places[i]] for i in self._updates.left_out]
        notes = [f"updates not measured, no room within the memory limit: {listed(left_out)}"] if left_out else []
        return [*notes, _ESTIMATES] if self._updates.is_sampled else notes

    def close(self) -> None:
        if self._updates is not None:
            self._updates.release()
        self._updates, self._is_open = None, False
