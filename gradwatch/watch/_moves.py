"""Update ratios around the optimizers' step: in runs with parameters in pieces every rank takes part, always."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from ..stats import Gradients
from ._draft import Draft
from ._guard import Guard
from ._meter import Meter
from ._transfer import Transfer

__all__ = ["Moves"]

_PART = "update ratios"


class Moves:
    """Measures how far a step moves the parameters, for the draft of its record.

    Norms of parameters in pieces need every rank after the step. A rank whose own step was vetoed, whose measuring
    failed, or whose part is switched off takes part with nothing to say; no rank then puts that step's updates on
    record.
    """

    def __init__(self, meter: Meter, guard: Guard) -> None:
        self._meter = meter
        self._guard = guard
        self._to_step: set[int] = set()

    def before(self, step: int, grads: Gradients, optimizers: Sequence[Optimizer], *, moves: bool = True) -> None:
        """Get ready before the optimizers step; `moves`: whether they move anything on this rank."""
        self._to_step = set(map(id, optimizers))
        with self._guard(_PART):
            self._meter.before_update(step, grads, moves=moves and self._guard.ok(_PART))

    def after(self, optimizer: Optimizer, draft: Draft | None) -> None:
        """Measure, once the last of the optimizers that step together has moved."""
        self._to_step.discard(id(optimizer))
        if self._to_step:
            return
        with self._guard(_PART, self._meter.drop_update):
            positions, parts = self._meter.after_update()
            if parts and draft is not None:
                draft.update_positions, draft.updates = positions, Transfer(parts)
