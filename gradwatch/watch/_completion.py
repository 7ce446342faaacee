"""The last part of a step: its record completed, judged by the late rules, and handed on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch.optim import Optimizer

from ..protocols import Action, Request
from ..records import Incident, StepRecord
from ..rules import Fired
from ._context import Decision, StepContext
from ._draft import Draft
from ._driver import Applied, run_actions
from ._guard import Guard
from ._judge import Judge, own_incident

__all__ = ["Completion", "stop_request"]


def stop_request(fired: Fired) -> Request:
    """Return the request of a rule that has fired `stop_after` times running."""
    return Request(kind="stop", reason=f"stop: {fired.incident}", values={"error": True})


class Completion:
    """Turns drafts into records as their numbers arrive, in order.

    Attributes:
        history: the recent records.
        late_requests: of rules judged after their step; the adapter takes and clears them.
        num_overflows: steps that a loss scaler skipped.
        num_skipped: steps that were vetoed.
    """

    def __init__(
        self,
        judge: Judge,
        optimizers: Sequence[Optimizer],
        guard: Guard,
        on_record: Callable[[StepRecord], None],
        *,
        history: int,
    ) -> None:
        self._judge = judge
        self._optimizers = optimizers
        self._guard = guard
        self._on_record = on_record
        self._pending: deque[Draft] = deque()
        self.history: deque[StepRecord] = deque(maxlen=history)
        self.late_requests: list[Request] = []
        self.num_overflows = 0
        self.num_skipped = 0

    def build(self, draft: Draft, norms: NDArray[np.float64] | None = None) -> StepRecord:
        """Make the record of what was measured before treatment, and count the loss scaler's overflows."""
        record = draft.build(norms)
        overflow = record.scalars.get("amp_overflow")
        if overflow is None:
            return record
        self.num_overflows += int(overflow)
        scalars = {**record.scalars, "num_overflows": float(self.num_overflows)}
        draft.record = replace(record, scalars=scalars)
        return draft.record

    def note(self, draft: Draft, *, waited: bool) -> StepRecord:
        """Put the treatments on record and with their incidents; where nobody waited, let treatments count now."""
        record = draft.add_treatments()
        if draft.applied is not None and not waited:
            decision = Decision()
            context = StepContext(draft.step, self._optimizers, decision, is_treatment=True)
            record = draft.record = replace(record, treatments=draft.applied.settle(record.treatments, context))
            self.late_requests.extend(decision.requests)
        for report in record.treatments:
            if report.rule and report.applied:
                self._judge.engine(draft.optimizer).note_treatments(report.rule, (report.name,))
        return record

    def ask(
        self,
        actions: Sequence[tuple[Action, Incident]],
        step: int,
        optimizers: Sequence[Optimizer],
        decision: Decision,
    ) -> None:
        """Let actions ask what they ask of the trainer."""
        for action, error in run_actions(actions, step=step, optimizers=optimizers, decision=decision):
            self._guard.report(f"action {action.name!r}", error)

    def tell_failures(self, applied: Applied, step: int, decision: Decision) -> None:
        """Veto the step where a treatment failed, and say so: it never fails open."""
        for job, error in applied.failures:
            name = job.treatment.name
            decision.add_veto(True, f"treatment {name!r} failed")
            what = f"treatment {name!r} raised {type(error).__name__}: {error}; the step was vetoed"
            self._judge.report(own_incident("treatment_failed", step, what, (name,)))
            self._guard.report(f"treatment {name!r} (the step was vetoed)", error)

    def push(self, draft: Draft) -> None:
        """Take a step that is over."""
        self._pending.append(draft)

    def drain(self, *, wait: bool) -> None:
        """Judge and hand on every step whose numbers have arrived; all of them with `wait`."""
        while self._pending and (wait or self._pending[0].ready):
            draft = self._pending.popleft()
            with self._guard("records", self._pending.clear):
                self._complete(draft)

    def _complete(self, draft: Draft) -> None:
        was_judged = draft.record is not None
        if not was_judged:
            if draft.num_failed:
                return
            self.build(draft)
            self.late_requests.extend(draft.out_of_step())
            self.note(draft, waited=False)
        self.num_skipped += int(draft.vetoed)
        record = draft.add_updates()
        judgement = self._judge.judge(record, "late" if was_judged else "all")
        self.history.append(record)
        self._act_late(judgement.fired, draft)
        self._on_record(record)

    def _act_late(self, fired: Sequence[Fired], draft: Draft) -> None:
        """Let the actions of rules that were judged after the step ask; their treatments come too late for it."""
        actions = [(a, f.incident) for f in fired for a in f.then if isinstance(a, Action)]
        stops = [stop_request(f) for f in fired if f.stop]
        if actions or stops:
            decision = Decision(requests=stops)
            self.ask(actions, draft.step, self._optimizers, decision)
            self.late_requests.extend(decision.requests)
