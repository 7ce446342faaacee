"""One watched run: the engine with its sinks, its incident lines and its state. Shared by every adapter."""

from __future__ import annotations

import atexit
import copy
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .._closing import end_all, how_ended
from .._warn import log, one_line, warn
from ..errors import ConfigError
from ..notebook import LiveCell, RunCard, Series
from ..protocols import Sink
from ..records import ENDED_WELL, GOING_ON, Incident, Incidents, StepRecord, Verdict, judge_run
from ..requests import Request
from ..sinks import RunFolder, SafeSinks
from ..torchside import member, weakly
from ._batch import look, num_samples
from ._case_files import CaseFiles
from ._coverage import Standing, coverage
from ._deepspeed import check_deepspeed
from ._engine import Engine, StepOutcome
from ._incident_target import IncidentTarget, incident_sink
from ._meeting import Meeting
from ._named import own_numbers
from ._noise_scale import noise_line
from ._paths import unwrap
from ._prediction import Forward
from ._ranks import is_writer
from ._requests import Home, carry_out, makes_sense_at_the_end
from ._rollbacks import Rollbacks
from ._run_meta import run_meta
from ._sealed import UnusableState, check, seal
from ._settings import Settings
from ._step_inputs import StepInputs
from ._summary import summarize
from ._tasks import Tasks, tasks_of
from ._telling import Telling
from ._told_incidents import ToldIncidents
from ._unseen import unseen, why_nothing
from ._what_ifs import what_ifs_of

__all__ = ["Session"]


class Session:
    """One run. Adapters tell it what happens; it tells the engine, the sinks and the user.

    Args:
        model: as the user has it; wrappers are taken off.
        optimizers: raw torch optimizers.
        settings: from `resolve`.
        sinks: where records go, beside the run folder.
        run_dir: folder for the run's files, or None.
        log_every: cadence of sinks that do not choose their own.
        say: shows one line to the user.
        on_incident: told of incidents, in a thread of its own: a callable, or an http(s) address (see `incident_sink`).
        start_step: optimizer steps taken before this run (a resumed one).
    """

    def __init__(  # noqa: PLR0913 - a door: flat names, resolved at once
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        settings: Settings,
        *,
        sinks: Sequence[Sink] = (),
        run_dir: str | Path | None = None,
        log_every: int = 50,
        say: Callable[[str], None] | None = None,
        on_incident: IncidentTarget | None = None,
        start_step: int = 0,
    ) -> None:
        self.settings = settings
        self.model = unwrap(model)
        # Lightning takes the compiled module apart, and keeps the compiler's context on the one inside.
        self._is_compiled = any(member(model, name) is not None for name in ("_orig_mod", "_compiler_ctx"))
        self._closed = self._done = self._is_finished = False
        self._why, self._num_records = "", 0
        self._telling = Telling()
        self._exit: Callable[[], object] = lambda: None
        self._unseen: list[str] = []
        self.tasks: Tasks | None = None
        self._tasks_state: Any = None
        self._numbers: dict[str, float] = {}
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.engine = Engine(
            self.model,
            optimizers,
            book=settings.book,
            treatments=settings.treatments,
            options=settings.options,
            statistics=settings.statistics,
            run_dir=self.run_dir,
            meeting=Meeting(model),
            on_incident=weakly(self._incident),
            on_record=weakly(self._record),
        )
        self.what_ifs = what_ifs_of(settings, self.model, optimizers)
        self.cases = CaseFiles(self.engine, saves_batches=settings.options.save_batch, what_ifs=self.what_ifs)
        self.cases.folder = "" if self.run_dir is None else str(self.run_dir)
        self._told = ToldIncidents(self.run_dir, say or log, self.cases)
        self.cases.say = weakly(self._told.print)
        self._check_treatments()
        self._pid = os.getpid()
        chosen = self._chosen(sinks, on_incident) if is_writer() else []
        self.sinks = SafeSinks(chosen, log_every=log_every, on_error=settings.options.on_error)
        try:
            self.sinks.open(run_meta(self.settings, self.model, self.run_dir, start_step))
        except BaseException:
            with suppress(Exception):  # what is on its way comes out
                self.close("not begun")
            raise
        if self.sinks.keeps_early:
            self.engine.completion.on_arrived = self.sinks.arrived
        self._exit = _write_at_exit(self)

    def _check_treatments(self) -> None:
        """Say what treatments can't reach, or raise."""
        strange, zero = self.engine.meter.watched.strange, self.engine.meter.watched.zero
        if strange and self.engine.treats:
            path, why = next(iter(strange.items()))
            warn(f"no treatment will act: {len(strange)} parameters can't be seen, {path!r} among them: {why}.")
        if zero is not None:
            check_deepspeed(zero, self.settings, treats=self.engine.treats)

    def _chosen(self, sinks: Sequence[Sink], on_incident: IncidentTarget | None) -> list[Sink]:
        """Return the sinks, the run folder first."""
        chosen = [*([] if self.run_dir is None else [RunFolder(self.run_dir)]), *sinks]
        if on_incident is not None:
            chosen.append(incident_sink(on_incident))
        if self.settings.live:
            chosen.append(LiveCell(self.settings.live))
        return chosen

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def incidents(self) -> list[Incident]:
        """All incidents so far, as they stand now, in the order in which they began."""
        self.engine.catch_up()
        return Incidents(self.cases.with_cases(self.engine.judge.incidents))

    @property
    def history(self) -> list[StepRecord]:
        """The recent records, oldest first; bounded."""
        self.engine.catch_up()
        return list(self.engine.completion.history)

    @property
    def notes(self) -> list[str]:
        """What gradwatch could not see, or has switched off."""
        notes = [*self.engine.guard.notes, *self.sinks.notes]
        if self.engine.rollbacks is not None:
            notes.append(self.engine.rollbacks.snapshots.note)
        if self._is_compiled and self.settings.options.activations_every is not None:
            notes.append("the model is compiled: what hooks on modules should measure is not seen there")
        if not self._closed:
            with self.engine.guard("notes on what was not seen"):
                engine = self.engine
                self._unseen = unseen(engine.meter, engine.judge, engine.announced, engine.tables.measurements)
        return notes + self._unseen

    def coverage(self) -> dict[str, Standing]:
        """Return what every parameter and module counted as at the last step, and why: path -> (state, reason).

        States are "measured", "no gradient", "in no optimizer", "replaced" (an optimizer holds it, the model no more)
        and "unseen".
        """
        return coverage(self.engine.meter)

    @property
    def wrote(self) -> bool:
        """The run folder is there, and all of the run is in it."""
        return self.run_dir is not None and not self.sinks.trouble and (self.run_dir / "meta.json").is_file()

    def verdict(self) -> Verdict:
        """Return whether all is well, or why that can't be said."""
        self.engine.catch_up()
        coverage = self.engine.judge.coverage
        return judge_run(
            incidents=self.incidents,
            coverage=coverage,
            num_steps=max([self._num_records, *(entry.seen for entry in coverage)]),
            ended=self._ended,
        )

    @property
    def _ended(self) -> str:
        """How the run ended, in words; that it ended well, or goes on."""
        if self.sinks.trouble and not self._why:
            return f"recording failed ({self.sinks.trouble})"
        if not self._why and (self._is_finished or not self._closed):
            return ENDED_WELL if self._is_finished else GOING_ON
        return how_ended(self._why, self.history[-1].step + 1 if self.history else 0)

    def summary(self) -> str:
        """Return the verdict, the table of layers and the incidents, as text."""
        return summarize(
            self.history,
            self.incidents,
            verdict=self.verdict(),
            num_skipped=self.engine.completion.num_skipped,
            remarks=[*self.engine.delivered.remarks, *noise_line(self.history)],
            notes=self.notes,
            why_nothing=why_nothing(self.engine.meter, self.engine.announced),
        )

    def card(self) -> RunCard:
        """Return the run as a notebook shows it, from the records in memory."""
        history, skipped = self.history, self.engine.completion.num_skipped
        model, facts = type(self.model).__name__, []
        if history:
            facts.append(f"{model}: {len(history):,} records, steps {history[0].step:,} to {history[-1].step:,}")
        facts += (
            [f"the optimizer was kept from moving at {skipped:,} step{'s' if skipped > 1 else ''}"] if skipped else []
        )
        return RunCard.of(self.verdict(), Series(history), self.incidents, facts=facts, notes=self.notes)

    def _record(self, record: StepRecord) -> None:
        self._num_records += 1
        self.sinks.push(record)
        if self._told.has_news:
            self._tell()
        if self.cases.is_waiting:
            with self.engine.guard("case files"):
                self.cases.follow(record.step, self.sinks)

    def _incident(self, incident: Incident) -> None:
        self._told.note(incident)

    def _tell(self) -> None:
        self._told.tell(self.engine, self.sinks)

    def begin(self, lightning_module: Any = None) -> None:
        """Begin to collect task losses, where surgery or conflict diagnosis is asked for.

        Args:
            lightning_module: whose `training_step` returns them; None in loops that call `backward({...})` or `split`.
        """
        tasks = tasks_of(self.settings, self.model, lightning_module)
        if tasks is not None:
            self.collect(tasks)

    def collect(self, tasks: Tasks) -> None:
        """Take the task losses from these."""
        self.tasks = tasks
        self.engine.meter.is_muted = lambda: tasks.tasks.probing
        if self._tasks_state is not None:
            tasks.load_state_dict(self._tasks_state)

    def before_forward(self, step: int) -> None:
        """Say that a micro-batch begins."""
        if self._closed:
            return
        if self.tasks is not None:
            self.tasks.begin(step)
        self.engine.before_forward(step)
        if self.what_ifs is not None:
            with self.engine.guard("what would cure it"):
                self.what_ifs.begin(step)

    def before_backward(self, loss: Tensor, *, scale: float = 1.0, parts: int = 1) -> None:
        """Say that backward comes next: task gradients are probed here.

        Args:
            loss: what backward will be called on.
            scale: the loss scaler's, that `loss` is already multiplied by.
            parts: accumulated micro-batches, that it is already divided by.
        """
        self.engine.before_backward(scale, loss, parts)
        if self.tasks is not None and not self._closed:
            self.tasks.before_backward(loss, scale / parts)

    def after_backward(self, *, last: bool, scale: float = 1.0, parts: int = 1, batch_size: float = 1.0) -> None:
        """Say that one micro-batch's backward is over; `last`: the optimizer steps next."""
        if self.tasks is not None and not self._closed:
            self.tasks.after_backward(last=last, grad_scale=scale / parts, batch_size=batch_size)
            self.engine.produced.void()

    def step(self, inputs: StepInputs, optimizers: Sequence[Optimizer] | None = None) -> StepOutcome:
        """Measure, judge and treat, with what surgery has to say put on record. Nothing, once the session is closed."""
        if self.tasks is not None and not self._closed:
            inputs.scalars = inputs.scalars | self.tasks.report()
        if not self._closed:
            if inputs.batch is not None:
                self.see(inputs.batch)
            self.cases.batches.stepped(inputs.step)
            if self.what_ifs is not None:
                with self.engine.guard("what would cure it"):
                    self.what_ifs.stepped(inputs)
        if self._numbers:
            inputs.scalars, self._numbers = self._numbers | inputs.scalars, {}
        return StepOutcome() if self._closed else self.engine.after_backward(inputs, optimizers)

    def see(self, batch: Any) -> None:
        """Show a micro-batch, which may tell its samples. What `look` and `step` are given is seen already."""
        if self.cases.batches.wants(batch):
            with self.engine.guard("case files"):
                self.cases.batches.see(batch)
        if self.what_ifs is not None:
            with self.engine.guard("what would cure it"):
                self.what_ifs.see(batch)
        self.engine.see(batch)

    def after_step(self) -> None:
        self.engine.gates.stepped()
        self.engine.finish_step()
        if self.engine.rollbacks is None:
            return
        self.engine.go_back()
        if self.engine.rollbacks.news:
            self._tell_returns(self.engine.rollbacks)

    def _tell_returns(self, rollbacks: Rollbacks) -> None:
        news, rollbacks.news = rollbacks.news, []
        for told in news:
            text = f"{told.rule}: {told.words}"
            if is_writer():
                self._told.print(text)
            # With the steps: what a replay's rules remember goes back as it did here.
            self.sinks.annotate(text=text, rolled_back={"from": told.step, "to": told.to, "rule": told.rule})
            self._numbers |= {"rolled_back_from": float(told.step), "rolled_back_to": float(told.to)}
        self._tell()

    def restores(
        self,
        *,
        scaler: Any = None,
        wrappers: Sequence[Any] = (),
        also: Callable[[], Mapping[str, Any]] = dict,
        schedulers: Callable[[], Sequence[Any]] = tuple,
    ) -> None:
        """Say what goes back with the model and its optimizers when the training is taken back.

        Args:
            scaler: the loss scaler.
            wrappers: optimizers of the user's own around those that are watched.
            also: gives averaged models and the like, by name.
            schedulers: gives the learning rates' schedulers.
        """
        if self.engine.rollbacks is not None:
            training = self.engine.rollbacks.training
            training.scaler, training.wrappers = scaler, wrappers
            training.also, training.schedulers = also, schedulers

    def register(self, objects: Mapping[str, Any]) -> None:
        """Let more go back with the training: averaged models, schedulers, whatever has a state."""
        if self.engine.rollbacks is not None:
            self.engine.rollbacks.training.register(objects)

    def optimizer_number(self, optimizer: Optimizer) -> int:
        """Return which of the run's optimizers this is."""
        return next((i for i, o in enumerate(self.engine.optimizers) if o is optimizer), 0)

    def count_samples(self, batch: Any) -> int:
        return num_samples(batch)

    def look(self, batch: Any, outputs: Any) -> Forward:
        """Return what is kept of a forward pass, for `StepInputs.batch`: for trainers that see it end, and can't hold
        what it took and gave until the step."""
        self.engine.meter.is_told = True
        self.see(batch)
        return look(batch, outputs, self.engine.guard, sampled=self.engine.meter.armed)

    def carry_out(self, request: Request, home: Home) -> None:
        """Do what an action asks for, here or in the trainer."""
        carry_out(request, home, engine=self.engine, tasks=self.tasks, telling=self._telling)

    def take_requests(self) -> list[Request]:
        """Return what rules asked for that were judged after their step, once."""
        requests = list(self.engine.completion.late_requests)
        self.engine.completion.late_requests.clear()
        return requests

    def take_last_requests(self) -> list[Request]:
        """Return what rules asked for at the last steps, whose numbers came when all was over, once.

        Those apart that would change the steps to come.
        """
        return [request for request in self.take_requests() if makes_sense_at_the_end(request)]

    def annotate(
        self, text: str, *, silence: int = 0, paths: str | Sequence[str] = "*", rules: str | Sequence[str] = "*"
    ) -> None:
        """Put a note on record, and keep rules silent for a number of steps (a data switch, a new schedule)."""
        self.engine.annotate(text, silence=silence, paths=paths, rules=rules)
        if not self._closed:
            # With the step: a replay must keep still over the same steps.
            self.sinks.annotate(text=text, silence=silence, paths=paths, rules=rules)

    def record(self, values: Mapping[str, Any]) -> None:
        """Put numbers of the user's own on the next step's record; what is none is told once and left out."""
        self._numbers |= own_numbers(values, self.engine.guard)

    def state_dict(self) -> dict[str, Any]:
        return seal(self._memory(), self.engine.meter.watched.index)

    def _memory(self) -> dict[str, Any]:
        state = self.engine.state_dict()
        if self.tasks is not None:
            state["surgery"] = self.tasks.state_dict()
        return state

    def load_state_dict(self, state: Any) -> bool:
        """Go on from a state, and return True. One that can't be gone on from (damaged, of another release, of another
        model) gives one warning; all begins afresh, as if there were none.

        Raises:
            ConfigError: it can't, and `on_error` is "raise".
        """
        before: Mapping[str, Any] | None = None
        try:
            usable = check(state, self.engine.meter.watched.index)
            before = copy.deepcopy(self._memory())
            self._take_up(usable)
        except Exception as error:
            if before is not None:
                with suppress(Exception):
                    self._take_up(before)
            why = str(error) if isinstance(error, UnusableState) else f"can't be gone on from: {one_line(error)}"
            told = f"the state in the checkpoint {why}. gradwatch begins afresh, and the training goes on"
            if self.settings.options.on_error == "raise":
                raise ConfigError(f"{told}.") from error
            self.engine.guard.limit(told, aloud=True)
            return False
        return True

    def _take_up(self, state: Mapping[str, Any]) -> None:
        self.engine.load_state_dict(state)
        self._tasks_state = state.get("surgery")
        if self.tasks is not None and self._tasks_state is not None:
            self.tasks.load_state_dict(self._tasks_state)

    def finish(self, scalars: Mapping[str, float] | None = None) -> None:
        """End the run well: the last records, rules that judge the whole run, the summary.

        Args:
            scalars: what was learnt after the last step (a last validation).
        """
        scalars, self._numbers = {**self._numbers, **(scalars or {})}, {}
        self.engine.finish(scalars)
        self._is_finished = True
        if scalars:
            self.sinks.annotate(closing=dict(scalars))
        self._tell()
        self._finish_cases()
        self.sinks.summary(self.summary())

    def close(self, why: str = "") -> None:
        """Take everything off the model, write what is left. May be called twice, and goes on where it was interrupted.

        Args:
            why: how the run ended, where it did not come to its end: `"interrupted"`, `"crashed: ..."`.
        """
        if self._done:
            return
        _ = self.notes  # while there is something left to ask
        self._closed, self._why = True, self._why or why
        self._end(why)
        self._done, self._told.say = True, log  # a trainer's own way of showing lines holds the trainer
        self._exit()

    def _end(self, why: str) -> None:
        first = [] if self.tasks is None else [self.tasks.close]
        last = [] if self.what_ifs is None else [self.what_ifs.close]
        # The collector, where it found this in a cycle, has let go of all weak references by now: the last records
        # would reach nobody.
        self.engine.listen(self._record, self._incident)
        try:
            end_all(*first, self.engine.close, partial(self._write_last, why), self.sinks.close, *last)
        finally:
            self.engine.listen(weakly(self._record), weakly(self._incident))

    def _finish_cases(self) -> None:
        with self.engine.guard("case files"):
            self.cases.finish(self.sinks)

    def _write_last(self, why: str) -> None:
        self._tell()
        self._finish_cases()
        if why:
            self.sinks.ended(why)
        self.sinks.judged(self.verdict(), self._ended)

    def __del__(self) -> None:
        # Nobody holds it any more: hooks have gone by themselves, what was measured is written. Not in a forked child,
        # whose memory is a copy, nor in an interpreter that is half taken down.
        if getattr(self, "_pid", None) == os.getpid() and not self._done and not sys.is_finalizing():
            with suppress(Exception):
                self._end("abandoned")


def _write_at_exit(session: Session) -> Callable[[], None]:
    """Write what is left when the interpreter ends without `close`; return what calls that off."""
    reference, pid = weakref.ref(session), os.getpid()

    def write() -> None:
        alive = reference()
        if alive is not None and os.getpid() == pid:
            with suppress(Exception):
                end_all(alive.engine.close, alive._tell, alive.sinks.flush)

    atexit.register(write)
    return lambda: atexit.unregister(write)
