"""The engine: measures, judges and treats, and knows no trainer. Adapters translate trainers' events into its calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..protocols import Action, Request, Treatment
from ..records import Finding, Incident, StepRecord
from ..rules import RuleBook
from ..stats import Gradients
from ..treatments import BufferKeeper, LearningRates, SkipStep
from ._autopsy import Autopsy, Replay, examine, rng_state
from ._completion import Completion, stop_request
from ._context import Decision, StepOutcome
from ._draft import Draft, StepInputs
from ._driver import Applied, Job, attach, fired_jobs, learning_jobs, limit_jobs, load_treatments, run_treatments
from ._gate import Gates, StepGate
from ._guard import Guard
from ._judge import Judge, own_incident
from ._meter import Meter
from ._moves import Moves
from ._observe import Observer
from ._options import MeasureOptions
from ._ranks import world_size
from ._timed import timed
from ._transfer import Transfer

__all__ = ["Engine", "StepInputs", "StepOutcome"]

MAX_FAILURES = 10
"""Steps in a row that may be vetoed because measuring failed, before the training is stopped."""

ALARMS = ("non_finite", "exploding")
"""Rules whose incidents make gradwatch look closer."""
ALERT_STEPS = 3


class Engine:
    """Measures, judges and treats the steps of one model's training.

    Args:
        model: the user's model, unwrapped.
        optimizers: raw torch optimizers.
        book: the rules.
        treatments: applied at every step.
        options: what to measure.
        on_incident: told of every incident that opens or changes.
        on_record: told of every finished record.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        book: RuleBook,
        treatments: Sequence[Treatment] = (),
        options: MeasureOptions,
        on_incident: Callable[[Incident], None],
        on_record: Callable[[StepRecord], None],
    ) -> None:
        self.model = model
        self.optimizers, self.book = tuple(optimizers), book
        self.treatments = tuple(treatments)
        self.options = options
        self.guard = Guard(options.on_error)
        self.judge = Judge(book, on_error=options.on_error, on_incident=on_incident)
        self.meter = Meter(model, optimizers, options)
        self.rates = LearningRates(optimizers)
        size = 3 * 8 * max(len(self.meter.watched.index), 1)
        fits = max(16, min(options.history, options.memory_limit_bytes // 4 // size))
        self.completion = Completion(self.judge, self.optimizers, self.guard, on_record, history=fits)
        self._gates = Gates(self.optimizers, self._on_stepped)
        behind_rules = [t for rule in book.rules for t in rule.then if isinstance(t, Treatment)]
        acts = self.all_treatments = (*self.treatments, *behind_rules)
        self.treats = bool(acts)
        self._needs_host = any(getattr(t, "needs_host", False) for t in acts)
        self.buffers = BufferKeeper(model) if any(isinstance(t, SkipStep) for t in acts) else None
        self._installed = attach(acts, model)
        self.treats_errors = bool(self._installed)
        self._step, self._begun = 0, -1
        self.spent = 0.0
        self._measured: tuple[int, int | None] | None = None
        self._current: Draft | None = None
        self._failures = 0
        self._remeasured: set[int] = set()
        self._replays: list[Replay] = []
        self.autopsy: Autopsy | None = None
        self._observer, self._moves = Observer(self.meter, self.guard), Moves(self.meter, self.guard)

    @property
    def waits(self) -> bool:
        """Whether numbers are read in the step they belong to.

        Always on the CPU; on a device only where a rule that has no limit of its own carries a treatment.
        """
        if self.meter.device.type == "cpu" or self._needs_host:
            return True
        limits = self.judge.limits()
        return any(any(isinstance(t, Treatment) for t in r.then) and r.name not in limits for r in self.book.rules)

    @timed
    def before_forward(self, step: int) -> None:
        """Say that the forward passes of a step begin. May be called once per micro-batch."""
        if self._begun != step:
            self._replays = []
        if self.meter.samples(step) and self.guard.ok("hooks on modules"):
            with self.guard("hooks on modules", self.meter.disarm):
                self.meter.arm()
        if self.buffers is not None and self._begun != step:
            with self.guard("copies of the buffers"):
                self.buffers.keep()
        self._begun = step

    def remember(self, run: Callable[[], Any]) -> None:
        """Keep how to run the present micro-batch again, for an autopsy; call it before forward."""
        if self.options.autopsy:
            self._replays.append(Replay(rng_state(), run))

    def before_backward(self, scale: float) -> None:
        """Say what the loss is multiplied by, for treatments of error signals inside backward (C7)."""
        for handle in self._installed:
            handle.grad_scale = scale

    @timed
    def after_backward(self, inputs: StepInputs, optimizers: Sequence[Optimizer] | None = None) -> StepOutcome:
        """Measure, judge and treat the gradients that lie complete in `.grad`, before the optimizer steps."""
        optimizers = self.optimizers if optimizers is None else tuple(optimizers)
        key = (inputs.step, inputs.optimizer)
        if self._measured == key:
            # A closure called again (LBFGS): one decision per step stands (O1).
            return StepOutcome(skip=self._current is not None and self._current.vetoed)
        self.finish_step()
        self._measured = key
        self._step = inputs.step
        # Clears a veto whose step never came: it must not fall on this one (O4).
        self._gates.arm(optimizers, False)
        if not self.guard.ok("measuring"):
            self._give_up(inputs, optimizers)
            return StepOutcome()
        try:
            outcome = self._run(inputs, optimizers, Decision())
        except Exception as error:
            return self._failed(error, optimizers)
        self._failures = 0
        return outcome

    def _give_up(self, inputs: StepInputs, optimizers: Sequence[Optimizer]) -> None:
        """Let no rank wait for this one, which can't measure."""
        if inputs.step % self.options.every or world_size() == 1 or not self.guard.ok("telling the other ranks"):
            return
        grads = None
        with suppress(Exception):
            grads = self.meter.gradients(optimizers, inputs.grad_scale)
        # If they are gone, torch's own next collective says so.
        with self.guard("telling the other ranks"):
            self._observer.give_up(inputs.step, grads)
            if grads is not None:
                self._moves.before(inputs.step, grads, optimizers, moves=False)

    def _failed(self, error: Exception, optimizers: Sequence[Optimizer]) -> StepOutcome:
        """Measuring broke. Without treatments it is switched off; with them it must not fail open."""
        self.meter.disarm()
        self._current = None
        if not self.treats:
            self.guard.report("measuring", error)
            return StepOutcome()
        self._failures += 1
        what = f"{type(error).__name__}: {error}; the step was vetoed"
        self.judge.report(own_incident("measuring_failed", self._step, what))
        self.guard.report("measuring for treatments (the step was vetoed)", error)
        decision = Decision(veto=True)
        if self._failures >= MAX_FAILURES:
            reason = f"{self._failures} steps in a row could not be measured, and were vetoed: {error}"
            decision.requests.append(Request(kind="stop", reason=reason, values={"error": True}))
        return self._decide(None, decision, optimizers, ())

    def _run(self, inputs: StepInputs, optimizers: Sequence[Optimizer], decision: Decision) -> StepOutcome:
        due = inputs.step % self.options.every == 0
        if not due and not self.treatments:
            self.meter.refresh()
            self.meter.disarm()
            return StepOutcome()
        try:
            self.meter.refresh()
            grads = self.meter.gradients(optimizers, inputs.grad_scale)
        except Exception:
            self._give_up(inputs, optimizers)
            raise
        if not due:
            self.meter.disarm()
            self._treat([Job(t) for t in self.treatments], grads, decision, optimizers, self.waits)
            return self._decide(None, decision, optimizers, ())
        inputs.scalars = {**inputs.scalars, "overhead_seconds": self.spent}
        self.spent = 0.0
        self._observer.num_failed_treatments += self.judge.take_failed_deciders()
        try:
            draft = self._current = self._observer.observe(inputs, grads, optimizers)
            return self._act(draft, grads, decision, optimizers)
        except Exception:
            self._moves.before(inputs.step, grads, optimizers, moves=False)
            raise

    def _act(self, draft: Draft, grads: Gradients, decision: Decision, optimizers: Sequence[Optimizer]) -> StepOutcome:
        findings: Sequence[Finding] = ()
        actions: list[tuple[Action, Incident]] = []
        jobs = [Job(t) for t in self.treatments]
        waits = self.waits
        limits = self.judge.limits(draft.optimizer)
        draft.note_limit(limits.values())
        if waits:
            if draft.num_failed:
                raise RuntimeError(f"this step could not be measured on {draft.num_failed} of {draft.num_ranks} ranks")
            norms = self.meter.look_again(grads, draft.numbers.result()["norms"])
            record = self.completion.build(draft, norms)
            judgement = self.judge.judge(record, "early")
            findings = judgement.findings
            self._alarm(judgement.opened, grads)
            if record.scalars.get("amp_overflow"):
                jobs = []  # the loss scaler drops this step by itself: nothing to treat, to learn or to count
            jobs += learning_jobs(self.book, judgement.fired)
            for fired in judgement.fired:
                jobs += fired_jobs(fired, limits.get(fired.rule.name))
                actions += [(a, fired.incident) for a in fired.then if isinstance(a, Action)]
                if fired.stop:
                    decision.requests.append(stop_request(fired))
            decision.requests.extend(draft.out_of_step())
        else:
            jobs += limit_jobs(self.book, grads, limits)
            if draft.failed is not None and self.treats:
                decision.add_veto(draft.failed > 0, "")
        applied = self._treat(jobs, grads, decision, optimizers, waits)
        self.completion.ask(actions, draft.step, optimizers, decision)
        draft.applied = applied
        parts = {**applied.parts(), "global_norm_after": grads.global_norm}
        if isinstance(decision.veto, Tensor):
            parts["veto"] = decision.veto
        draft.treated = Transfer(parts)
        outcome = self._decide(draft, decision, optimizers, findings)
        self.meter.note_gradients(grads)
        overflow = draft.record is not None and bool(draft.record.scalars.get("amp_overflow"))
        if not overflow:
            self._moves.before(draft.step, grads, optimizers, moves=not outcome.skip)
        return outcome

    def _alarm(self, opened: Sequence[Incident], grads: Gradients) -> None:
        """Look closer from here on where gradients explode or are not finite, and find out where it was born."""
        alarms = [i for i in opened if i.rule in ALARMS]
        if not alarms:
            return
        self.meter.alert_until = self._step + ALERT_STEPS
        if not self._replays or not self.guard.ok("autopsy"):
            return
        with self.guard("autopsy"):
            found = self.autopsy = examine(self.model, self._replays, grads.params)
            if found.born:
                details = {"born_in": found.born, "phase": found.phase}
                for incident in alarms:
                    self.judge.explain(incident, details, first_path=found.born)

    def _decide(
        self, draft: Draft | None, decision: Decision, optimizers: Sequence[Optimizer], findings: Sequence[Finding]
    ) -> StepOutcome:
        veto = decision.veto
        if isinstance(veto, Tensor) and draft is not None and self._can_veto_on_device(draft, optimizers):
            self._gates.arm_on_device(optimizers, veto)
            return StepOutcome(findings=findings, requests=tuple(decision.requests))
        # A veto that was decided on the device must be known before the step: the one wait that can't be avoided.
        veto = bool(veto)
        self._gates.arm(optimizers, veto)
        if veto:
            self.completion.num_skipped += int(draft is None)
            if self.buffers is not None:
                with self.guard("restoring buffers"):
                    self.buffers.restore()
        record = None
        if draft is not None:
            draft.vetoed = veto
            record = draft.record and self.completion.note(draft, waited=True)
        return StepOutcome(skip=veto, record=record, findings=findings, requests=tuple(decision.requests))

    def _can_veto_on_device(self, draft: Draft, optimizers: Sequence[Optimizer]) -> bool:
        # Buffers can't be put back without knowing; a loss scaler sets `found_inf` itself.
        has_buffers = self.buffers is not None and len(self.buffers) > 0
        return not has_buffers and not draft.scaler and all(StepGate.can_arm_on_device(o) for o in optimizers)

    def _treat(
        self, jobs: list[Job], grads: Gradients, decision: Decision, optimizers: Sequence[Optimizer], waits: bool
    ) -> Applied:
        """Run treatments; a failure vetoes the step."""
        options: Any = {"step": self._step, "optimizers": optimizers, "decision": decision, "can_read": waits}
        applied = run_treatments(jobs, grads, remeasured=self._remeasured, **options)
        self._observer.num_failed_treatments += len(applied.failures)
        self.completion.tell_failures(applied, self._step, decision)
        return applied

    def _on_stepped(self, optimizer: Optimizer) -> None:
        self._moves.after(optimizer, self._current)

    @timed
    def finish_step(self) -> None:
        """Complete the last step's record: called after the optimizer has stepped, or at the latest before the next."""
        draft, self._current = self._current, None
        self.meter.drop_update()
        if draft is not None:
            self.completion.push(draft)
        self.completion.drain(wait=self.waits)

    def finish(self, scalars: Mapping[str, float]) -> None:
        """End the run: complete every record, let rules that judge a whole run speak; see `Session.finish`."""
        self.finish_step()
        self.completion.drain(wait=True)
        with self.guard("rules at the end of the run"):
            self.judge.finish(self._step, scalars)

    def close(self) -> None:
        """Take everything off the model and the optimizers. May be called twice."""
        with self.guard("closing"):
            self.finish_step()
            self.completion.drain(wait=True)
        self.meter.close()
        self.rates.close()
        for handle in self._installed:
            handle.remove()
        self._installed = []
        self._gates.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as plain values and tensors (loads with `weights_only=True`, L4)."""
        return {
            "version": 1,
            "judge": self.judge.state_dict(),
            "treatments": [t.state_dict() for t in self.all_treatments],
            "rates": self.rates.state_dict(),
            "num_skipped": self.completion.num_skipped,
            "num_overflows": self.completion.num_overflows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; treatments that are not the saved ones start afresh, with a warning."""
        self.judge.load_state_dict(state.get("judge", {}))
        load_treatments(self.all_treatments, state.get("treatments", []), self.guard)
        self.rates.load_state_dict(state.get("rates", {}))
        self.completion.num_skipped = int(state.get("num_skipped", 0))
        self.completion.num_overflows = int(state.get("num_overflows", 0))
