"""The engine: measures, judges and treats, and knows no trainer. Adapters translate trainers' events into its calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .._warn import one_line
from ..errors import ConfigError
from ..protocols import Statistic, Treatment
from ..records import Incident, StepRecord
from ..requests import StopTraining
from ..rules import RuleBook, treatments_of
from ..stats import Gradients
from ..torchside import Aside, every_random_state, graph_task_id, is_host, weakly
from ..treatments import BufferKeeper, LearningRates, SkipStep
from ._after_step import AfterStep
from ._alarmed import Alarmed, note_histograms
from ._announced import Announced
from ._autopsy import Autopsy, examine
from ._carriers import Carriers, carriers, gathered
from ._completion import MAX_FAILURES, Completion
from ._context import Decision, StepOutcome
from ._delivered import Delivered
from ._ending import end_guarded
from ._fingerprints import Fingerprints
from ._gate import Gates, Vetoes
from ._guard import Guard
from ._history import History
from ._judge import Judge, own_incident
from ._measurements import measurements
from ._measuring import Measuring
from ._meeting import Meeting, terms_of
from ._memory import memory_of, remember
from ._model_meter import ModelMeter
from ._noise_scale import NoiseScale
from ._options import MeasureOptions
from ._own_updates import own_updates
from ._plan import ALERT_STEPS, Planner, reasons_to_wait
from ._produced import Produced
from ._proofs import Proofs
from ._ranks import are_several, world_size
from ._recomputation import Recomputation
from ._record_draft import Draft
from ._replays import ForwardMemory, Replay
from ._rollbacks import rollbacks_of
from ._run_treatments import attach
from ._statistics import OwnStatistics
from ._step_inputs import StepInputs
from ._tables import Tables
from ._timed import timed
from ._treating import Treating
from ._turn import Turn
from ._veto import Proof
from ._views import Views

__all__ = ["Engine", "StepInputs", "StepOutcome"]

ALARMS = ("non_finite", "exploding")
"""Rules whose incidents make gradwatch look closer."""

OF_SAMPLES = (*ALARMS, "loss_spike")
"""Rules whose incidents may be the work of a few samples."""


class Engine:
    """Measures, judges and treats the steps of one model's training.

    Args:
        model: the user's model, unwrapped.
        optimizers: raw torch optimizers.
        book: the rules.
        treatments: applied at every step.
        options: what to measure.
        statistics: the user's own measurements.
        run_dir: where snapshots may lie that are to lie in files.
        meeting: tells whether the other ranks take part.
        on_incident: told of every incident that opens or changes.
        on_record: told of every finished record.

    Attributes:
        ends_at_once: `finish_step` follows the optimizers' steps, with nothing in between.
        is_off: the other ranks do not take part: nothing is measured, judged or treated any more.
        is_replaying: a step's micro-batches are run again: what hooks see is none of the training's.
        waits_for: what makes every step wait for the device: a treatment that must look, or a rule with a treatment
            that is not decided by one norm alone. "" where nothing does.
    """

    def __init__(  # noqa: PLR0913 - what a session was asked for, part by part
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        book: RuleBook,
        treatments: Sequence[Treatment] = (),
        options: MeasureOptions,
        statistics: Sequence[Statistic] = (),
        run_dir: Path | None = None,
        meeting: Meeting | None = None,
        on_incident: Callable[[Incident], None],
        on_record: Callable[[StepRecord], None],
    ) -> None:
        self.model, self.options = model, options
        self.optimizers, self.book = tuple(optimizers), book
        self.treatments = tuple(treatments)
        self.guard = Guard(options.on_error)
        self.judge = Judge(book, on_error=options.on_error, on_incident=on_incident)
        self.meter = ModelMeter(model, optimizers, options)
        views, built_in = Views(), measurements(self.meter)
        self.own = OwnStatistics(statistics, self.meter, self.guard, views) if statistics else None
        of_updates = own_updates(statistics, self.meter, views)
        self.tables = Tables((*built_in, *of_updates, *statistics), self.meter, self.guard, views)
        self.rates = LearningRates(optimizers)
        self._meeting, self._statistics = meeting or Meeting(model), tuple(statistics)
        self.completion = Completion(
            self.judge,
            self.optimizers,
            self.guard,
            on_record,
            self.meter.account.note,
            history=History(options.history, options.memory_limit_bytes // 4),
            on_judged=weakly(self._on_judged),
            is_apart=weakly(self._judges_apart, False),
        )
        parts: Any = {"judge": self.judge, "completion": self.completion, "guard": self.guard}
        self.rollbacks = rollbacks_of(book, model, self.optimizers, run_dir, every=options.every, **parts)
        self._stepping: Sequence[Optimizer] = ()
        self.announced = Announced()
        self.delivered = Delivered(self.meter, self.guard)
        behind_rules = [t for rule in book.rules for t in treatments_of(rule)]
        acts = self.all_treatments = (*self.treatments, *behind_rules)
        self.treats = bool(acts)
        self._movers = [t for t in acts if t.moves_weights]
        self._may_veto = self.treats or self.rollbacks is not None
        told = weakly(self._on_stepped), weakly(self._on_stepping)
        self.proofs = Proofs(self.judge, self.completion.late_requests, stops=options.stop_on_unproven)
        self.gates = Gates(self.optimizers, *told, self.guard, self._vetoes())
        self.waits_for = reasons_to_wait(book, acts, options)
        self.planner = Planner(options, self.meter, self.tables.statistics, waits=self.waits)
        self.buffers = BufferKeeper(model) if any(isinstance(t, SkipStep) for t in acts) else None
        self._treating = self._treats(parts)
        self._installed = attach(acts, model, self)
        self.treats_errors = bool(self._installed)
        self._begin()

    def _treats(self, parts: Mapping[str, Any]) -> Treating:
        """Return what treats; parts: judge, completion and guard."""
        return Treating(
            self.book,
            self.treatments,
            treats=self.treats,
            waits=self.waits,
            meter=self.meter,
            gates=self.gates,
            buffers=self.buffers,
            rollbacks=self.rollbacks,
            on_alarm=weakly(self._alarm_in_step),
            **parts,
        )

    def _begin(self) -> None:
        """Set up what a step goes through, before there was one."""
        self._step, self._begun, self._failures = 0, -1, 0
        self.spent, self.is_timed, self.ends_at_once = 0.0, False, False
        self._measured: tuple[int, int | None] | None = None
        self._current: Draft | None = None
        self._replays: list[Replay] = []
        self._inputs: StepInputs | None = None
        self.is_replaying = self.is_off = False
        self.autopsy: Autopsy | None = None
        self.alarmed: Alarmed = {}
        self.produced = Produced(self.meter, self.guard, weakly(self._is_due))
        self._measuring = Measuring(self.meter, self.guard, self.own, self.tables, self.produced, treats=self.treats)
        self.after_the_step = AfterStep(self.guard)
        self.recomputation = self.tables.find(Recomputation)
        self.fingerprints = self.tables.find(Fingerprints)
        if self.fingerprints is not None:
            self.fingerprints.is_wanted = weakly(self._prints, False)
        if self.recomputation is not None:
            self.recomputation.is_acted_upon = self.treats_errors
        if (noise := self.tables.find(NoiseScale)) is not None:
            noise.history = weakly(self._records_alike, ())

    def _prints(self) -> bool:
        """Whether the batch at hand is to be known again."""
        if self.is_replaying or self.meter.is_muted():
            return False
        return self.options.fingerprints or self.planner.at(max(self._begun, 0)).modules

    @property
    def step(self) -> int:
        """The step that was measured last."""
        return self._step

    def _vetoes(self) -> Vetoes:
        meter, rates = self.meter, self.rates
        return Vetoes(
            limit_bytes=self.options.memory_limit_bytes,
            names=lambda: meter.watched.names,
            tell=weakly(self._tell_proof),
            lowered=lambda: rates.factor != 1.0,
            possible=self._may_veto,
            in_parts=meter.watched.zero is not None,
            parts=lambda: meter.watched.zero_masters,
        )

    def _tell_proof(self, proof: Proof) -> None:
        self.proofs.tell(proof, self._step)

    def _judges_apart(self) -> bool:
        return are_several() and world_size() > 1 and not (self.waits_for or is_host(self.meter.device))

    @property
    def waits(self) -> bool:
        """Whether a step waits for its numbers, on a device where they arrive late: `waits_for` says why."""
        return bool(self.waits_for)

    @timed
    def before_forward(self, step: int) -> None:
        """Say that the forward passes of a step begin. May be called once per micro-batch."""
        if self.is_off:
            return
        plan = self.planner.at(step)
        self.produced.counts = plan.histograms and not self.produced.is_to_compare(step)
        if plan.modules and self.guard.ok("hooks on modules"):
            with self.guard("hooks on modules", self.meter.disarm):
                self.meter.arm()
        if self.own is not None:
            with self.guard("statistics of one's own"):
                self.own.begin(step)
        if self.buffers is not None and self._begun != step:
            with self.guard("copies of the buffers"):
                self.buffers.keep()
        if self._may_veto and self._begun != step:
            self.gates.begin()
        if plan.statistics:
            self.tables.begin(step, plan.statistics)
        self._begun = step

    def remembers(self) -> bool:
        """Return whether the micro-batches of the step that has begun are kept to be run again."""
        begun = max(self._begun, 0)
        return self.options.autopsy or bool(self.tables.rerunning(self.planner.at(begun).statistics))

    def listen_to_forwards(self, model: nn.Module) -> list[ForwardMemory]:
        """Return what keeps the model's forward passes by itself, where they may be wanted; to be closed."""
        if not (self.options.autopsy or self.tables.rerunning(self.tables.statistics)):
            return []
        return [ForwardMemory(model, weakly(self.remember), weakly(self.remembers, False))]

    def remember(self, run: Callable[[], Any], size: int = 0, grads: Mapping[str, Tensor] | None = None) -> None:
        """Keep how to run the present micro-batch again, where that may be wanted; call it before forward. See
        `Replay`."""
        if self.remembers() and not self.is_replaying:
            with Aside():
                self._replays.append(Replay(every_random_state(), run, size, grads))

    def see(self, batch: Any) -> None:
        """Look at a micro-batch, by which the step's data are known again."""
        prints = self.fingerprints
        if prints is not None and batch is not None and prints.is_wanted():
            prints.see(batch)

    def before_backward(self, scale: float, loss: Any = None, parts: int = 1) -> None:
        """Say what the loss is multiplied by, for treatments of error signals inside backward; and show it.

        Args:
            scale: the loss scaler's.
            loss: that backward is called on.
            parts: accumulated micro-batches, that it is divided by.
        """
        if loss is not None and self.recomputation is not None:
            self.recomputation.note_scale(scale / parts)
        if loss is not None and self.meter.armed and self.guard.ok("the loss's graph"):
            with self.guard("the loss's graph"):
                self.meter.see_loss(loss)
        for handle in self._installed:
            handle.grad_scale = scale

    def is_left_open(self, step: int, optimizer: int | None) -> bool:
        """Return whether a step was measured under this number and nobody has said that it is over."""
        return self._measured == (step, optimizer)

    @timed
    def after_backward(self, inputs: StepInputs, optimizers: Sequence[Optimizer] | None = None) -> StepOutcome:
        """Measure, judge and treat the gradients that lie complete in `.grad`, before the optimizer steps."""
        optimizers = self.optimizers if optimizers is None else tuple(optimizers)
        if self.is_off:
            return StepOutcome()
        if self._measured == (key := (inputs.step, inputs.optimizer)):
            # A closure called again (LBFGS): one decision per step stands.
            return StepOutcome(skip=self._current is not None and self._current.vetoed)
        if self._current is not None or self.completion.has_news:
            self._complete_last()
        is_of_left_weights = self.rollbacks is not None and self._go_back_late(optimizers)
        self._measured, self._step, self._stepping = key, inputs.step, optimizers
        self.announced.expect(optimizers)
        self.delivered.announce(inputs, optimizers)
        # Clears a veto whose step never came: it must not fall on this one.
        self.gates.arm(optimizers, False)
        self._inputs = inputs if self.options.autopsy else None
        turn = Turn(self.planner.at(inputs.step), inputs, optimizers, self._measuring, self.after_the_step)
        if turn.plan.num_ranks > 1 and self._is_alone(inputs.step):
            return StepOutcome()
        if "measuring" in self.guard.failed:
            turn.give_up()
            return StepOutcome()
        if is_of_left_weights:
            turn.decision.add_veto(True, "its gradient is of weights that were left")
        try:
            outcome = self._run(turn)
        except Exception as error:
            turn.give_up()
            return self._failed(error, optimizers)
        self._failures = 0
        return outcome

    def _is_alone(self, step: int) -> bool:
        """Whether the other ranks do not take part alike. Then all of gradwatch goes: what it would exchange they would
        take for what they exchange themselves, and a treatment on some ranks alone would part their weights."""
        why = self._meeting.why_alone(partial(self._terms, step))
        if not why:
            return False
        self.is_off, self._measured = True, None
        self.take_off()
        self.guard.report("measuring", ConfigError(why))
        return True

    def _terms(self, step: int) -> dict[str, Any]:
        return terms_of(self.options, self.book.rules, self.all_treatments, self._statistics, step)

    def _go_back_late(self, optimizers: Sequence[Optimizer]) -> bool:
        """Go back where that was asked for and nobody said that the step was over; return whether the gradients at hand
        are of weights that were left."""
        if self.rollbacks is None:
            return False
        is_late = self.rollbacks.is_asked
        if is_late:
            self.gates.over()  # what a veto has kept unmoved is to move now
            self.go_back()
            self.gates.begin()
        return self.rollbacks.take_stale(optimizers) or is_late

    @timed
    def go_back(self) -> None:
        """Take the training back where a rule has asked for it, or take a snapshot that is due: between two steps."""
        if self.rollbacks is not None and self._measured is not None:
            self.rollbacks.settle(self._step, self._stepping)

    def _failed(self, error: Exception, optimizers: Sequence[Optimizer]) -> StepOutcome:
        """Measuring broke. Without treatments it is switched off; with them it must not fail open."""
        self.meter.disarm()
        self._current = None
        if not self.treats:
            self.guard.report("measuring", error)
            return StepOutcome()
        self._failures += 1
        self.judge.report(own_incident("measuring_failed", self._step, f"{one_line(error)}; the step was vetoed"))
        self.guard.report("measuring for treatments (the step was vetoed)", error)
        decision = Decision(veto=True)
        if self._failures >= MAX_FAILURES:
            reason = f"{self._failures} steps in a row could not be measured, and were vetoed: {one_line(error)}"
            decision.requests.append(StopTraining(reason=reason, as_error=True))
        return self._treating.decide(None, decision, optimizers)

    def _is_due(self) -> bool:
        """Whether the step that has begun is measured."""
        return max(self._begun, 0) % self.options.every == 0

    def _run(self, turn: Turn) -> StepOutcome:
        inputs, meter = turn.inputs, self.meter
        if meter.refresh(inputs.step):
            self.tables.follow()
            self.produced.listen()
        if not turn.plan.measures:
            self.produced.pass_over()
            meter.disarm()
            if not self.treatments:
                return StepOutcome()
        if turn.plan.num_ranks > 1:
            self._measuring.compare(turn)
        turn.grads, turn.tensors = grads, _ = meter.listed_gradients(turn.optimizers, inputs.grad_scale)
        if not turn.plan.measures:
            return self._treating.act_unmeasured(turn)
        if turn.plan.statistics:
            self._rerun(turn)
        inputs.scalars = {**inputs.scalars, "overhead_seconds": self.spent}
        self.spent = 0.0
        if turn.plan.num_ranks > 1:
            self._measuring.num_failed_treatments += self.judge.take_failed_deciders() + self._treating.num_failed
            self._treating.num_failed = 0
            self._measuring.num_unproven += self.proofs.take_untold()
        turn.draft = draft = self._current = self._measuring.measure(turn)
        turn.tensors = None
        outcome = self._treating.act(turn)
        self.delivered.expect(turn)
        if draft.applied is not None:
            meter.note_gradients(grads)
        overflow = draft.record is not None and bool(draft.record.scalars.get("amp_overflow"))
        if turn.plan.statistics and not overflow:
            self.after_the_step.before(turn, moves=outcome.skip is not True)
        return outcome

    def _alarm_in_step(self, opened: Sequence[Incident], step: int, grads: Gradients) -> None:
        self._alarm(opened, step, grads.params, grads)

    def _alarm(
        self, opened: Sequence[Incident], step: int, params: Sequence[Tensor], grads: Gradients | None = None
    ) -> None:
        """Look closer from here on where gradients explode or are not finite, and find out where it was born."""
        alarms = [i for i in opened if i.rule in ALARMS]
        if alarms:
            self.planner.look_closer(self._step + ALERT_STEPS)
        if alarms and grads is not None and self.options.histograms_every is not None:
            with self.guard("histograms at an alarm"), Aside():
                note_histograms(self.alarmed, alarms, step, grads)
        if step != self._step or not self.options.autopsy:
            return
        self.is_replaying = True
        try:
            if alarms:
                self._find_birth(alarms, params)
            self._find_samples([i for i in opened if i.rule in OF_SAMPLES], params)
        finally:
            self.is_replaying = False

    def _find_birth(self, alarms: Sequence[Incident], params: Sequence[Tensor]) -> None:
        if not self._replays or not self.guard.ok("autopsy"):
            return
        with self.guard("autopsy"):
            found = self.autopsy = examine(self.model, self._replays, params)
            if found.born:
                details = {"born_in": found.born, "phase": found.phase}
                for incident in alarms:
                    self.judge.explain(incident, details, first_path=found.born)

    def _find_samples(self, incidents: Sequence[Incident], params: Sequence[Tensor]) -> None:
        if not incidents:
            return
        own = Carriers()
        if self._replays and self.guard.ok("telling samples apart"):
            with self.guard("telling samples apart"):
                try:
                    own = carriers(self.model, self._replays, params, self._inputs)
                except ValueError as error:
                    self.guard.limit(f"which samples carry the gradient can't be told: {error}", aloud=True)
        # All ranks judge alike, and meet here.
        with self.guard("telling samples of several ranks apart"):
            found = gathered(own)
            for incident in incidents:
                self.judge.explain(incident, found.details())

    def _records_alike(self) -> Sequence[StepRecord]:
        """Return the records of all parameters: of several optimizers, each has the norm of its own alone."""
        return list(self.completion.history) if len(self.optimizers) == 1 else ()

    def _rerun(self, turn: Turn) -> None:
        """Run the step's micro-batches again for what asks for it, where that can be done."""
        for measurement in self.tables.rerunning(turn.plan.statistics):
            if not self.guard.ok(measurement.part):
                continue
            with self.guard(measurement.part):
                self.is_replaying = True
                try:
                    measurement.rerun(self._replays, turn.inputs)
                except ValueError as error:
                    self.guard.limit(measurement.unseen.format(error), aloud=True)
                finally:
                    self.is_replaying = False

    def _on_judged(self, draft: Draft, opened: Sequence[Incident]) -> None:
        """Called with every step that is complete: what was judged only then may be an alarm, too."""
        self.delivered.note(draft)
        self._measuring.hear_late(draft, self._step)
        for proof in draft.proofs:
            self.proofs.tell(proof.result(), draft.step)
        if opened:
            self._alarm(opened, draft.step, self.meter.watched.held)

    def _on_stepping(self, optimizer: Optimizer) -> None:
        if graph_task_id() != -1:
            self.meter.account.note_inside(optimizer)
            return
        self.announced.stepping(optimizer)
        self.delivered.stepping(optimizer)

    def _on_stepped(self, optimizer: Optimizer) -> None:
        if graph_task_id() != -1:
            return
        if self.after_the_step.is_due:
            self.after_the_step.after(optimizer, self._current)
        for treatment in () if self._current is not None and self._current.vetoed else self._movers:
            self._move(treatment, optimizer)
        self.produced.stepped()
        if not self.ends_at_once:
            self._next_begins()
        self.announced.stepped(optimizer)

    def _move(self, treatment: Treatment, optimizer: Optimizer) -> None:
        """Let a treatment move weights once more, now that the optimizer has."""
        try:
            treatment.stepped(optimizer)
        except Exception as error:
            what = f"treatment {treatment.name!r} raised {one_line(error)} after the optimizer's step"
            self.judge.report(own_incident("treatment_failed", self._step, what, (treatment.name,), is_harm=False))
            self.guard.stumble(f"treatment {treatment.name!r} failed after the optimizer's step", error)

    def broke_off(self) -> None:
        """Say that the optimizers' steps have raised, and that `finish_step` does not follow."""
        self._next_begins()

    def _next_begins(self) -> None:
        self.meter.account.begin(self.meter.watched, is_plain=self._step + 1 < self.planner.plain_until)

    @timed
    def finish_step(self) -> None:
        """Complete the last step's record: called after the optimizer has stepped."""
        if self.is_off:
            return
        self._complete_last()
        if self._measured is not None and self._measured[0] == self._begun:
            # Not between the micro-batches of a step.
            if self._replays:
                self._replays, self._inputs = [], None
            if self.recomputation is not None and self.recomputation.is_listening:
                self.recomputation.forget()
        if are_several():
            self.tables.stepped(self._step, one_by_one=len(self.optimizers) > 1)
        self.announced.forget()
        if self.delivered.is_waiting:
            self.delivered.forget()
        self.produced.settle()
        self.meter.account.begin(self.meter.watched, is_plain=self._step + 1 < self.planner.plain_until)

    def _complete_last(self) -> None:
        draft, self._current = self._current, None
        if self.after_the_step.is_due:
            self.after_the_step.forget()
        if draft is not None:
            self.completion.push(draft)
        self.completion.advance(wait=bool(self.waits_for))

    def catch_up(self) -> None:
        """Judge every step whose numbers have arrived: somebody asks."""
        self.completion.catch_up()

    def annotate(self, text: str, *, silence: int, paths: str | Sequence[str], rules: str | Sequence[str]) -> None:
        """Put a note on record, and keep rules silent for a number of steps from the one that begins now."""
        step = self._begun if self._begun > self._step or self._measured is None else self._step + 1
        self.judge.annotate(text, silence=silence, paths=paths, rules=rules, step=step if step >= 0 else None)

    def listen(self, on_record: Callable[[StepRecord], None], on_incident: Callable[[Incident], None]) -> None:
        """Tell others of records and incidents from here on."""
        self.completion.on_record, self.judge.on_incident = on_record, on_incident

    def finish(self, scalars: Mapping[str, float]) -> None:
        """End the run: complete every record, let rules that judge a whole run speak; see `Session.finish`."""
        end_guarded(self.guard, self.finish_step, lambda: self.completion.drain(wait=True), self.proofs.end)
        with self.guard("rules at the end of the run"):
            self.judge.finish(self._step, scalars)

    def close(self) -> None:
        """Take everything off the model and the optimizers, whatever fails. May be called twice."""
        self.take_off()
        end_guarded(self.guard, self.finish_step, lambda: self.completion.drain(wait=True), self.proofs.end)

    def take_off(self) -> None:
        """Take every hook off, and put the optimizers' own rates back; what was measured stays to be written."""
        self._replays, self._inputs, self.buffers, self._treating.buffers = [], None, None, None
        own = [] if self.own is None else [self.own]
        back = [] if self.rollbacks is None else [self.rollbacks]
        looks = [self.produced, self.delivered, *self.tables.measurements]
        ours: list[Any] = [self.gates, self.announced, *looks, self.meter, *own, self.rates, *back]
        end_guarded(self.guard, *(x.close for x in ours), *(hooks.remove for hooks in self._installed))

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as plain values and tensors, of every step so far: those in flight are waited for. Where
        ranks judge a block of steps late (see `Completion`), of those that have been judged."""
        self.completion.catch_up(wait=True)
        return memory_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; treatments that are not the saved ones start afresh, with a warning."""
        remember(self, state)
