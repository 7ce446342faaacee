"""Update ratios around the optimizers' step: in runs with parameters in pieces every rank takes part, always."""

from __future__ import annotations

from torch.optim import Optimizer

from ._guard import Guard
from ._model_meter import ModelMeter
from ._record_draft import Draft
from ._transfer import Transfer
from ._turn import Turn

__all__ = ["UpdateRatios"]

_PART = "update ratios"


class UpdateRatios:
    """Measures how far a step moves the parameters, for the draft of its record.

    Norms of parameters in pieces need every rank after the step. A rank whose own step was vetoed, whose measuring
    failed, or whose part is switched off takes part with nothing to say; no rank then puts that step's updates on
    record.

    Attributes:
        is_due: `before` was called for the step that goes on.
    """

    def __init__(self, meter: ModelMeter, guard: Guard) -> None:
        self._meter = meter
        self._guard = guard
        self._to_step: set[int] = set()
        self.is_due = False

    def before(self, turn: Turn, *, moves: bool) -> None:
        """Get ready before the optimizers step; `moves`: whether they move anything on this rank."""
        turn.has_said_whether_it_moves = True
        if not turn.plan.updates:
            return
        self.is_due = True
        self._to_step = set(map(id, turn.optimizers))
        assert turn.grads is not None
        with self._guard(_PART):
            self._meter.before_update(turn.step, turn.grads, moves=moves and self._guard.ok(_PART))

    def after(self, optimizer: Optimizer, draft: Draft | None) -> None:
        """Measure, once the last of the optimizers that step together has moved."""
        self._to_step.discard(id(optimizer))
        if self._to_step or not self._meter.is_measuring_update:
            return
        with self._guard(_PART, self._meter.drop_update):
            positions, parts = self._meter.after_update()
            if parts and draft is not None:
                draft.update_positions, draft.updates = positions, Transfer(parts)

    def forget(self) -> None:
        """Say that the step is over: what was not measured of it is not any more."""
        self.is_due = False
        self._meter.drop_update()
