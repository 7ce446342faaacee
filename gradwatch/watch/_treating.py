"""What is done about a measured step before the optimizer moves: judged, treated, and let through or vetoed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..protocols import Action, Treatment
from ..records import Finding, Incident, StepRecord
from ..rules import RuleBook
from ..stats import Gradients
from ..torchside import weakly
from ..treatments import BufferKeeper
from ._completion import Completion, stop_request
from ._context import Decision, StepOutcome
from ._gate import Gates
from ._guard import Guard
from ._judge import Judge
from ._model_meter import ModelMeter
from ._plan import acts_in_step
from ._record_draft import Draft
from ._rollbacks import Rollbacks
from ._run_treatments import Applied, Job, alarm_jobs, fired_jobs, learning_jobs, run_treatments
from ._timed import calm_numpy
from ._transfer import Transfer
from ._turn import Turn

__all__ = ["Treating"]


@dataclass(eq=False)
class Treating:
    """Acts on the steps of one engine.

    Attributes:
        book: the rules.
        treatments: applied at every step.
        treats: there are treatments, here or behind rules.
        waits: every step waits for its numbers, and is judged before it is treated.
        buffers: puts the model's buffers back where a step is vetoed; None where nobody asked for that.
        on_alarm: told of incidents that open in the step they belong to, with it and its gradients, untreated.
        rollbacks: takes the training back; None where no rule asks for that.
        num_failed: treatments that raised, since somebody last set it to 0.
    """

    book: RuleBook
    treatments: Sequence[Treatment]
    treats: bool
    waits: bool
    judge: Judge
    completion: Completion
    meter: ModelMeter
    gates: Gates
    guard: Guard
    buffers: BufferKeeper | None
    on_alarm: Callable[[Sequence[Incident], int, Gradients], object]
    rollbacks: Rollbacks | None = None
    num_failed: int = 0
    _remeasured: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._acts_in_step = acts_in_step(self.book)
        self._shown = weakly(self._show)

    def act(self, turn: Turn) -> StepOutcome:
        """Judge a measured step where that can't wait, treat it, and decide whether the optimizer moves."""
        draft, grads, decision = turn.draft, turn.grads, turn.decision
        assert draft is not None
        assert grads is not None
        # On the CPU at once. On a device it may be so on one rank and not on another, which must do the same.
        has_arrived = draft.is_plain or (draft.numbers.ready and not self.completion.is_apart)
        if has_arrived and draft.num_ranks > 1 and draft.num_failed:
            raise RuntimeError(f"this step could not be measured on {draft.num_failed} of {draft.num_ranks} ranks")
        if self.book.rules:
            self.completion.put_limit(draft)
        if self.waits or (has_arrived and (self._acts_in_step or not self.completion.is_ordinary(draft))):
            jobs = self._judge_now(draft, grads, decision)
        elif self.treats or draft.failed is not None:
            jobs = self._jobs_unread(draft, grads, decision, has_arrived)
        else:
            jobs = []
        if self.meter.watched.strange:
            jobs = []  # they would act on a part of the gradient
        if has_arrived and draft.num_ranks > 1:
            decision.requests.extend(draft.out_of_step())
        if jobs:
            draft.applied = self.treat(turn, jobs, can_read=has_arrived or self.waits)
        if draft.actions:
            self.completion.ask(draft.actions, draft.step, turn.optimizers, decision)
            if self.rollbacks is not None and self.rollbacks.take(decision.requests):
                decision.add_veto(True, "rollback")
        if (draft.applied is not None and draft.applied.may_act) or isinstance(decision.veto, Tensor):
            draft.treated = _sent(draft, grads, decision)
        return self.decide(draft, decision, turn.optimizers)

    def act_unmeasured(self, turn: Turn) -> StepOutcome:
        """Treat a step that is not measured for the record."""
        assert turn.grads is not None
        can_read = self.waits or turn.grads.device.type == "cpu"
        if len(turn.grads) and not self.meter.watched.strange:
            self.treat(turn, [Job(t) for t in self.treatments], can_read=can_read)
        return self.decide(None, turn.decision, turn.optimizers)

    @calm_numpy
    def _judge_now(self, draft: Draft, grads: Gradients, decision: Decision) -> list[Job]:
        """Judge the step before the optimizer moves, all earlier ones before it; return the treatments to run."""
        self.completion.drain(wait=True)
        self.completion.pass_marks(draft.step)
        norms = draft.numbers.result()["norms"]
        again = self.meter.look_again(grads, norms)
        record = self.completion.build(draft, None if again is norms else again)
        judgement = self.judge.judge(record, "early")
        draft.judged, draft.findings = True, judgement.findings
        self.on_alarm(judgement.opened, draft.step, grads)
        # Nothing seen: nothing to treat, or to learn of.
        jobs = [Job(t) for t in self.treatments if len(grads)]
        limits = self.judge.limits(draft.optimizer)
        acting = [fired for fired in (*judgement.guarding, *judgement.fired) if fired.rule.acts(record)]
        jobs += learning_jobs(self.book, acting) if record.has_gradient else []
        for fired in acting:
            jobs += fired_jobs(fired, limits.get(fired.rule.name))
        for fired in judgement.fired:
            draft.actions = [*draft.actions, *((a, fired.incident) for a in fired.then if isinstance(a, Action))]
            if fired.stop:
                decision.requests.append(stop_request(fired))
        # An overflow the loss scaler drops by itself: nothing to treat, to learn or to count.
        return [] if record.scalars.get("amp_overflow") else jobs

    def _jobs_unread(self, draft: Draft, grads: Gradients, decision: Decision, has_arrived: bool) -> list[Job]:
        """Return the treatments of a step that nobody has judged: an ordinary one, or one whose numbers come late."""
        if not len(grads):
            return []
        if has_arrived:
            return [Job(t) for t in self.treatments] + (learning_jobs(self.book, ()) if self.treats else [])
        excused = ~torch.isfinite(grads.global_norm) if draft.scaler else None
        trigger: Any = True if excused is None else ~excused
        jobs = [Job(t, trigger=trigger) for t in self.treatments]
        if self.treats:
            alarms = self.judge.alarms(draft.step, draft.optimizer)
            limits = self.judge.limits(draft.optimizer)
            jobs += alarm_jobs(self.book, grads, alarms, limits, loss=draft.loss, excused=excused)
            if draft.failed is not None:
                decision.add_veto(draft.failed > 0, "")
        return jobs

    @calm_numpy
    def treat(self, turn: Turn, jobs: list[Job], *, can_read: bool) -> Applied:
        """Run treatments; a failure vetoes the step."""
        assert turn.grads is not None
        applied = run_treatments(
            jobs,
            turn.grads,
            step=turn.step,
            optimizers=turn.optimizers,
            decision=turn.decision,
            can_read=can_read,
            remeasured=self._remeasured,
        )
        self.num_failed += len(applied.failures)
        self.completion.tell_failures(applied, turn.step, turn.decision)
        return applied

    def decide(self, draft: Draft | None, decision: Decision, optimizers: Sequence[Optimizer]) -> StepOutcome:
        """Let the optimizers' next step through, or not."""
        veto, requests = decision.veto, tuple(decision.requests)
        ask = None if draft is None else partial(self._shown, draft)
        # Buffers can't be put back without knowing; a loss scaler sets `found_inf` itself.
        is_free = draft is not None and not draft.scaler and not self.buffers
        if draft is not None and isinstance(veto, Tensor) and is_free and self.gates.can_arm_on_device(optimizers):
            self.gates.arm_on_device(optimizers, veto, draft.add_proof)
            return StepOutcome(skip=None, requests=requests, ask=ask)
        # A veto that was decided on the device must be known before the step: the one wait that can't be avoided.
        veto = bool(veto)
        if veto:
            self.gates.arm(optimizers, True)
            self.completion.num_skipped += int(draft is None)
            if self.buffers is not None:
                with self.guard("restoring buffers"):
                    self.buffers.restore()
        if draft is not None:
            draft.vetoed = veto
            if draft.record is not None:
                self.completion.note(draft)
        return StepOutcome(skip=veto, requests=requests, ask=ask)

    def _show(self, draft: Draft) -> tuple[StepRecord | None, Sequence[Finding]]:
        """Return the record and the findings of a step, where its numbers have arrived."""
        if self.completion.is_apart:
            return draft.record, draft.findings
        if draft.record is None and draft.is_current and draft.numbers.ready:
            with self.guard("records"):
                self._judge_early(draft)
        elif not (draft.is_current or draft.is_kept):
            self.completion.drain(wait=False)
        return draft.record, draft.findings

    @calm_numpy
    def _judge_early(self, draft: Draft) -> None:
        self.completion.drain(wait=False)
        self.completion.pass_marks(draft.step)
        record = self.completion.build(draft)
        judgement = self.judge.judge(record, "early")
        draft.judged, draft.findings = True, judgement.findings
        asked = [(a, f.incident) for f in judgement.fired for a in f.then if isinstance(a, Action)]
        draft.actions = [*draft.actions, *asked]
        self.completion.note(draft)


def _sent(draft: Draft, grads: Gradients, decision: Decision) -> Transfer:
    """Send what the treatments of a step came to on its way to the host."""
    parts: dict[str, Tensor | float] = {} if draft.applied is None else dict(draft.applied.parts())
    parts["global_norm_after"] = grads.global_norm
    if isinstance(decision.veto, Tensor):
        parts["veto"] = decision.veto
    return Transfer(parts)
