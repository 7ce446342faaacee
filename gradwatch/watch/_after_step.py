"""What the optimizers' step does: measured around it, for the draft of its record."""

from __future__ import annotations

from torch.optim import Optimizer

from ..stats import Ranks
from ._guard import Guard
from ._measurement import Measurement
from ._record_draft import Draft
from ._tables import TablesDraft, view_of
from ._transfer import Transfer
from ._turn import Turn

__all__ = ["AfterStep"]


class AfterStep:
    """Lets measurements that span the step look before it and after it.

    Of parameters in pieces they need every rank after the step. A rank whose own step was vetoed, whose measuring
    failed, or whose part is switched off takes part with nothing to say; no rank then puts it on record.

    Attributes:
        is_due: `before` was called for the step that goes on, with something to measure.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._to_step: set[int] = set()
        self._due: list[Measurement] = []
        self.is_due = False

    def before(self, turn: Turn, *, moves: bool) -> None:
        """Get ready before the optimizers step; `moves`: whether they move anything on this rank."""
        turn.has_said_whether_it_moves = True
        due = [s for s in turn.plan.statistics if isinstance(s, Measurement) and s.spans_step]
        if not due:
            return
        self.is_due, self._due, self._to_step = True, due, set(map(id, turn.optimizers))
        view = view_of(turn, Ranks(turn.plan.num_ranks), None)
        for measurement in due:
            with self._guard(measurement.part):
                measurement.before_step(view, moves=moves and self._guard.ok(measurement.part))

    def after(self, optimizer: Optimizer, draft: Draft | None) -> None:
        """Measure, once the last of the optimizers that step together has moved."""
        self._to_step.discard(id(optimizer))
        if self._to_step:
            return
        found = TablesDraft(self._guard, self._due)
        for measurement in self._due:
            with self._guard(measurement.part, measurement.drop):
                found.add(measurement, measurement.after_step())
        if found.parts and draft is not None:
            draft.spanning, draft.updates = found, Transfer(found.parts)

    def drop(self) -> None:
        """Forget what was kept: the step did not happen, or not yet."""
        for measurement in self._due:
            measurement.drop()

    def forget(self) -> None:
        """Say that the step is over: what was not measured of it is not any more."""
        self.drop()
        self.is_due, self._due = False, []
