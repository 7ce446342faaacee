"""The last part of a step: its record completed, judged by the late rules, and handed on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from math import inf, isfinite

import numpy as np
from numpy.typing import NDArray
from torch.optim import Optimizer

from .._warn import one_line
from ..protocols import Action
from ..records import Incident, StepRecord
from ..requests import Request, StopTraining
from ..rules import Fired, Judgement
from ._context import Decision, StepContext
from ._guard import Guard
from ._history import History
from ._judge import Judge, own_incident
from ._record_draft import Draft, share_columns
from ._run_treatments import Applied, run_actions
from ._timed import calm_numpy

__all__ = ["BLOCK", "MAX_FAILURES", "Completion", "stop_request"]

BLOCK = 16
"""Ordinary steps that are judged together; asking, and anything unusual, wakes the judge at once."""

MAX_FAILURES = 10
"""Steps in a row that may be vetoed because something of ours failed, before the training is stopped."""


def stop_request(fired: Fired) -> StopTraining:
    """Return the request of a rule that has fired `stop_after` times running."""
    return StopTraining(reason=f"stop: {fired.incident}", as_error=True)


class Completion:
    """Turns drafts into records as their numbers arrive, in order.

    On several ranks numbers arrive at each in its own time, and what is judged decides what is done: limits that are
    clipped to, learning rates, a stop. There a step counts as arrived a block of steps later, on all ranks alike, and
    whoever asks before is told of what has been judged by then.

    Attributes:
        is_apart: whether that is so.
        history: the recent records.
        on_arrived: told of a record that waits to be judged with its block; None where nobody wants to know.
        late_requests: of rules judged after their step; the adapter takes and clears them.
        limits: by optimizer, the stretch of steps and the limit that stands on record in it.
        num_overflows: steps that a loss scaler skipped.
        num_skipped: steps that were vetoed.
    """

    def __init__(
        self,
        judge: Judge,
        optimizers: Sequence[Optimizer],
        guard: Guard,
        on_record: Callable[[StepRecord], None],
        account: Callable[[StepRecord], None],
        *,
        history: History,
        on_judged: Callable[[Draft, Sequence[Incident]], None] = lambda draft, opened: None,
        is_apart: Callable[[], bool] = lambda: False,
    ) -> None:
        self._judge = judge
        self._optimizers = optimizers
        self._guard = guard
        self.on_record, self._account = on_record, account
        self.on_arrived: Callable[[StepRecord], None] | None = None
        self._on_judged, self._is_apart = on_judged, is_apart
        self._latest = -1
        self._pending: deque[Draft] = deque()
        self._arrived = 0
        self._awake = False
        self._busy = False
        self._calm: tuple[float, float] | None = None
        self.limits: dict[int, tuple[int, float]] = {}
        self.history = history
        self.late_requests: list[Request] = []
        self._failed_in_a_row: dict[str, int] = {}
        self.num_overflows = 0
        self.num_skipped = 0
        self._marks: list[tuple[int, Callable[[], None]]] = []

    @property
    def is_apart(self) -> bool:
        return self._is_apart()

    def _has_come(self, draft: Draft) -> bool:
        """Return whether the numbers of a step are taken up now, which on several ranks may be a wait."""
        return draft.step <= self._latest - BLOCK if self._is_apart() else draft.ready

    def when_judged(self, step: int, call: Callable[[], None]) -> None:
        """Call back once every step before this one has been judged, and none from it on."""
        self._marks.append((step, call))

    def pass_marks(self, step: float = inf) -> None:
        """Say that steps from this one on are judged next."""
        while self._marks and self._marks[0][0] <= step:
            self._marks.pop(0)[1]()

    def go_back(self) -> None:
        """Forget what was worked out of the rules' memory, which has changed."""
        self.limits.clear()
        self._calm = None

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

    def note(self, draft: Draft) -> StepRecord:
        """Put the treatments on record; where nobody waited for the device, let them count now."""
        record = draft.add_treatments()
        if draft.applied is not None and draft.applied.names and not draft.judged:
            decision = Decision()
            context = StepContext(draft.step, self._optimizers, decision, is_treatment=True)
            record = draft.record = replace(record, treatments=draft.applied.settle(record.treatments, context))
            self.late_requests.extend(decision.requests)
        return record

    def _note_incidents(self, draft: Draft, record: StepRecord) -> None:
        """Say with the going incidents what was done about them."""
        for report in record.treatments:
            if report.rule and report.applied:
                self._judge.engine(draft.optimizer).note_treatments(report.rule, (report.name,), record.step)

    def ask(
        self,
        actions: Sequence[tuple[Action, Incident]],
        step: int,
        optimizers: Sequence[Optimizer],
        decision: Decision,
    ) -> None:
        """Let actions ask what they ask of the trainer."""
        for action, error in run_actions(actions, step=step, optimizers=optimizers, decision=decision):
            what = f"action {action.name!r} failed"
            self._judge.report(own_incident("action_failed", step, f"{what}: {one_line(error)}", is_harm=False))
            self._guard.stumble(what, error)

    def tell_failures(self, applied: Applied, step: int, decision: Decision) -> None:
        """Veto the step where a treatment failed, and say so: it never fails open."""
        for job, error in applied.failures:
            name = job.treatment.name
            decision.add_veto(True, f"treatment {name!r} failed")
            self._failed_in_a_row[name] = self._failed_in_a_row.get(name, 0) + 1
            if self._failed_in_a_row[name] == 1:
                what = f"treatment {name!r} raised {one_line(error)}; the step was vetoed"
                self._judge.report(own_incident("treatment_failed", step, what, (name,)))
            self._guard.stumble(f"treatment {name!r} failed: a step at which it fails is vetoed", error)
            if self._failed_in_a_row[name] >= MAX_FAILURES:
                count = f"{self._failed_in_a_row[name]} steps in a row"
                reason = f"treatment {name!r} failed at {count}, which were vetoed: {one_line(error)}"
                decision.requests.append(StopTraining(reason=reason, as_error=True))
        for name in {t.name for t in applied.treatments} - {job.treatment.name for job, _ in applied.failures}:
            self._failed_in_a_row.pop(name, None)

    @property
    def has_news(self) -> bool:
        """Whether there are steps that were over when they were last looked at, and whose numbers had not arrived."""
        return self._arrived < len(self._pending)

    def push(self, draft: Draft) -> None:
        """Take a step that is over."""
        draft.is_current = False
        self._latest = draft.step
        self._pending.append(draft)

    def is_ordinary(self, draft: Draft) -> bool:
        """Return whether a step whose numbers have arrived can wait for its block: nothing in it is unusual."""
        if draft.is_ordinary is None:
            if self._calm is None:
                self._calm = self._judge.calm(BLOCK + 1), self._loss_limit()
            draft.is_ordinary = draft.look(*self._calm)
        # An update that was measured comes to it when the optimizer has moved.
        return draft.is_ordinary and (draft.updates is None if draft.is_plain else not draft.is_sampled)

    def put_limit(self, draft: Draft) -> None:
        """Put on record the smallest global norm that some rule would not have accepted as a stretch of steps began.

        Stretches are counted by the step: whoever asks, saves a checkpoint or resumes, the same limit stands on record.
        """
        stretch, optimizer = draft.step // BLOCK, draft.optimizer
        if self.limits.get(optimizer, (-1, inf))[0] != stretch:
            self.drain(wait=False)
            self.limits[optimizer] = stretch, min(self._judge.limits(optimizer).values(), default=inf)
        limit = self.limits[optimizer][1]
        if isfinite(limit):
            draft.scalars["limit"] = limit

    @property
    def latest_norm(self) -> float | None:
        """The global norm of the last step whose numbers have arrived; None before there is one."""
        for draft in reversed(self._pending):
            if draft.ready:
                return float(draft.numbers.result()["global_norm"])
        return float(self.history[-1].global_norm) if self.history else None

    def _loss_limit(self) -> float:
        losses = [record.loss for record in islice(reversed(self.history), 64) if record.has_loss]
        if len(losses) < 8 or not all(map(isfinite, losses)):
            return inf
        highest = max(losses)
        return highest + 2.0 * (highest - min(losses)) + 1e-3 * abs(highest)

    def advance(self, *, wait: bool = False) -> None:
        """Hand on what has arrived: in blocks, and at once where something unusual is among it.

        Args:
            wait: for the last step's numbers, which were waited for already.
        """
        while self._arrived < len(self._pending):
            draft = self._pending[self._arrived]
            is_calm = draft.is_plain and draft.is_ordinary and not (draft.judged or draft.applied or draft.updates)
            if is_calm and self.on_arrived is None:
                self._arrived += 1
                continue
            with self._guard("records", self._forget):
                if not (wait or self._has_come(draft)):
                    break
                acted = draft.applied is not None and draft.applied.may_act
                self._awake = self._awake or draft.judged or draft.vetoed or acted or not self.is_ordinary(draft)
                if self.on_arrived is not None and not self._awake:
                    self._put_away(draft)
            if not self._pending:
                return
            self._arrived += 1
        if self._awake or self._arrived >= BLOCK:
            self.drain(wait=False)

    @calm_numpy
    def _put_away(self, draft: Draft) -> None:
        """Let a step that waits for its block be on record before: whatever ends the process then, it is not lost."""
        if draft.num_failed or self.on_arrived is None:
            return
        share_columns([draft])
        self._complete(draft)
        if draft.record is not None:
            self.on_arrived(draft.record)

    def _complete(self, draft: Draft) -> None:
        """Make the record of a step that nobody has looked at, whole but for its update; once."""
        if draft.record is None or draft.is_half_done:
            draft.is_half_done = True
            self.build(draft)
            self.note(draft)
            self.late_requests.extend(draft.out_of_step())
            draft.is_half_done = False

    def catch_up(self, *, wait: bool = False) -> None:
        """Judge what has arrived, because somebody asks: on several ranks it may be one of them alone that is asked."""
        if not self._is_apart():
            self.drain(wait=wait)

    @calm_numpy
    def drain(self, *, wait: bool) -> None:
        """Judge and hand on every step whose numbers have arrived; with `wait` all of them. On all ranks together."""
        if self._busy:
            return
        self._busy = True
        arrived: list[Draft] = []
        try:
            # Asking whether they have arrived is where a device tells of an error: those before it are kept.
            with self._guard("records", self._forget):
                while self._pending and (wait or self._has_come(self._pending[0])):
                    arrived.append(self._pending.popleft())
            self._arrived, self._awake = 0, False
            with self._guard("records", self._forget):
                self._hand_on(arrived)
        except BaseException:
            # Ctrl-C: what was not handed on yet is, when somebody comes back for it.
            self._pending.extendleft(reversed([draft for draft in arrived if not draft.is_kept]))
            raise
        finally:
            self._busy = False

    def _forget(self) -> None:
        self._pending.clear()
        self._arrived, self._awake = 0, False

    def _hand_on(self, drafts: Sequence[Draft]) -> None:
        """Complete steps in their order; an ordinary stretch of them at once."""
        known = [draft for draft in drafts if draft.judged or not draft.num_failed]
        share_columns(known)
        for draft in known:
            self._complete(draft)
            draft.add_delivered()
            draft.add_updates()
        start = 0
        for end in range(1, len(known) + 1):
            if end == len(known) or known[end].judged != known[start].judged or self._is_marked(known[end]):
                self.pass_marks(known[start].step)
                self._judge_in_turn(known[start:end])
                start = end
        if known:
            self._calm = None

    def _is_marked(self, draft: Draft) -> bool:
        return any(step <= draft.step for step, _ in self._marks)

    def _judge_in_turn(self, drafts: Sequence[Draft]) -> None:
        records = [draft.record for draft in drafts if draft.record is not None]
        acted = any(draft.applied is not None and draft.applied.may_act for draft in drafts)
        if drafts[0].judged or acted:
            # What was done is noted with the incident that is going on then.
            for draft, record in zip(drafts, records, strict=True):
                self._conclude(draft, record, self._judge.judge(record, "late" if draft.judged else "all"))
            return
        for draft, record, judgement in zip(drafts, records, self._judge.judge_all(records), strict=True):
            self._conclude(draft, record, judgement)

    def _conclude(self, draft: Draft, record: StepRecord, judgement: Judgement) -> None:
        if judgement.findings:
            draft.findings = [*draft.findings, *judgement.findings] if draft.judged else judgement.findings
        self._note_incidents(draft, record)
        self._on_judged(draft, judgement.opened)
        self._act_late(judgement.fired, draft)
        self._keep(draft, record)

    def _keep(self, draft: Draft, record: StepRecord) -> None:
        self.num_skipped += int(draft.vetoed)
        self.history.append(record)
        self._account(record)
        self.on_record(record)
        draft.is_kept = True

    def _act_late(self, fired: Sequence[Fired], draft: Draft) -> None:
        """Let the actions of rules that were judged after the step ask; their treatments come too late for it."""
        actions = [(a, f.incident) for f in fired for a in f.then if isinstance(a, Action)]
        stops = [stop_request(f) for f in fired if f.stop]
        if actions or stops:
            decision = Decision(requests=[*stops])
            self.ask(actions, draft.step, self._optimizers, decision)
            self.late_requests.extend(decision.requests)
