"""The door for plain training loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from .._markup import Text
from .._uncopied import Uncopied
from ..errors import TrainingStopped
from ..protocols import Sink, Treatment
from ..records import Incident, StepRecord, Verdict
from ..requests import Request, StopTraining
from ..torchside import untraced, weakly
from ._batch import num_samples, validation_inputs
from ._closure import Evaluated, closure_in, only_one, within_a_step
from ._deepspeed import EngineStepper, steppers_of
from ._ending import Ending
from ._engine import StepOutcome
from ._incident_target import IncidentTarget, incident_target
from ._paths import unwrap
from ._requests import Home
from ._run_dir import RunDir, run_dir_of
from ._scaler import ScaleReader, scale_left_in_gradients, unscale
from ._sealed import packed, unpacked
from ._session import Session
from ._settings import resolve
from ._stages import model_of
from ._step_inputs import StepInputs
from ._stepper import Stepper, chosen
from ._stepping import step_all
from ._training import is_transparent
from ._validation import validation_scalars

__all__ = ["Watch"]

_Batch = TypeVar("_Batch")


class Watch(Uncopied):
    """Watches the gradients of a plain training loop, and acts if asked.

    ```python
    with Watch(model, optimizer, rules="default", run_dir="runs/1") as watch:
        for x, y in loader:
            loss = loss_fn(model(x), y)
            loss.backward()
            watch.step(loss=loss)            # measure, judge, treat, then optimizer.step() unless vetoed
            optimizer.zero_grad()
    ```

    Nothing is written on the model; hooks come off when the `with` ends, however it ends. Where a model, a trainer or a
    data set of yours holds a watch, its deep copies and pickles hold None in that place: they are not watched.

    Args:
        model: the model as it is trained; DDP, compile, Fabric and Accelerate wrappers are looked through. Of a
            pipeline (`torch.distributed.pipelining`) its schedule, or the stages on this rank. Or what
            `deepspeed.initialize` returned: `Watch(engine)`, and `watch.step(loss=loss)` after every
            `engine.backward(loss)`, in the place of `engine.step()`.
        optimizer: one, or several that step together (or one at a time, with `step(optimizer=...)`); also as Fabric or
            Accelerate prepared them. While Accelerate accumulates, `step` waits for the last micro-batch. None for a
            DeepSpeed engine, which has its own.
        rules: `"observe"`, `"default"`, `"autoclip"`, a rules file, a list of rules or a `RuleBook`.
        scaler: a `torch.amp.GradScaler`, where one is used; `step` then calls its `step` and `update` too.
        treatments: for every step.
        surgery: a method's name or a `Surgery`, for `backward({...})` and `split(...)`.
        statistics: your own measurements: `gradwatch.stats.Statistic` objects, or names of registered ones.
        run_dir: folder for records and incidents (`~` is the home folder; a relative one stays where it is now); None
            and False: none; True: `<name>` in the working directory, or the first of `<name>-1`, `<name>-2`, ... that
            is free.
        sinks: where else records go.
        log_every: optimizer steps between two log entries of sinks without a cadence of their own.
        on_incident: told of incidents in a thread of its own: a callable (each one, when it opens and when it is over),
            an http(s) address that takes a POST of JSON, or `"module:function"`.
        on_checkpoint: called with a file name when a rule asks for a checkpoint.
        name: of the run; tags and state keys begin with it.
        options: `live`: in a notebook, a cell that shows the run while it trains (True, or seconds between two
            drawings); `paths`, `every`, `activations_every`, `updates_every`, `histograms_every`, `backward`,
            `memory_limit_mb`, `on_error`, ...: see `MeasureOptions`; `allow_code`: a rules file may name classes as
            `module:Class`, whose code runs when they are imported; and `what_if`: at the first critical incident try
            the training again with one thing changed at a time (True, or the loss function as `gradwatch.what_if`
            takes it; the batches are those of `step(batch=...)`).

    Raises:
        ConfigError: a setting that can't be, with the nearest valid names.
    """

    def __init__(  # noqa: PLR0913 - a door: flat names, resolved at once
        self,
        model: Any,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        rules: Any = "default",
        scaler: Any = None,
        treatments: Treatment | Sequence[Treatment] = (),
        surgery: Any = None,
        statistics: Any = (),
        run_dir: RunDir = None,
        sinks: Sequence[Sink] | None = None,
        log_every: int | None = None,
        on_incident: IncidentTarget | None = None,
        on_checkpoint: Callable[[str], object] | None = None,
        name: str = "gradwatch",
        paths: str | Sequence[str] = "*",
        every: int = 1,
        activations_every: int | None = 50,
        updates_every: int | None = 50,
        histograms_every: int | None = 100,
        backward: str = "tensor",
        memory_limit_mb: float = 256,
        on_error: str = "warn",
        **options: Any,
    ) -> None:
        cadences: dict[str, Any] = {"every": every, "log_every": log_every, "histograms_every": histograms_every}
        cadences |= {"activations_every": activations_every, "updates_every": updates_every}
        settings = resolve(
            rules=rules,
            treatments=treatments,
            surgery=surgery,
            statistics=statistics,
            sinks=sinks,
            name=name,
            paths=paths,
            backward=backward,
            memory_limit_mb=memory_limit_mb,
            on_error=on_error,
            **cadences,
            **options,
        )
        model = model_of(model, unwrap, has_surgery=surgery is not None)
        self._on_checkpoint = on_checkpoint
        self._take(steppers_of(model, optimizer), scaler)
        try:
            self.session = Session(
                model,
                self.optimizers,
                settings,
                sinks=settings.sinks or (),
                run_dir=run_dir_of(run_dir, settings.name, None),
                log_every=log_every or 50,
                on_incident=incident_target(on_incident),
            )
        except BaseException:
            if self._deepspeed is not None:
                self._deepspeed.detach()
            raise
        self._begin(model)

    def _take(self, steppers: tuple[Stepper, ...], scaler: Any) -> None:
        """Take what steps, with nothing seen of it yet."""
        self._steppers = steppers
        self.optimizers = tuple(s.raw for s in steppers)
        self._is_wrapped = any(s.given is not s.raw for s in steppers)
        # One inside a wrapper is the wrapper's to step and update; one given here is ours.
        inner = next((s.scaler for s in steppers if s.scaler is not None), None)
        self.scaler = inner if scaler is None or not scaler.is_enabled() else scaler
        self._stops: list[StopTraining] = []
        self._step = 0
        self._outcome = StepOutcome()
        self._extra: dict[str, float] = {}
        self._scale = ScaleReader()
        self._losses: list[Tensor] = []
        self._stack = ExitStack()
        self._micro_losses: list[Any] = []
        self._num_samples = 0
        self._epoch = self._batch_idx = -1
        self._deepspeed = next((s for s in self._steppers if isinstance(s, EngineStepper)), None)
        if self._deepspeed is not None:
            self._deepspeed.attach(weakly(self._step_came))

    def _begin(self, model: Any) -> None:
        """Begin the session: forward passes are listened to from here on."""
        self.session.restores(scaler=self.scaler, wrappers=_wrappers(self._steppers))
        self.session.engine.gates.know(s.given for s in self._steppers)
        self.session.begin()
        forwards = self.session.engine.listen_to_forwards(model)
        detached = [] if self._deepspeed is None else [self._deepspeed.detach]
        self._end = Ending(self.session, self._stack.close, *(f.close for f in forwards), *detached)
        self.session.before_forward(0)

    @property
    def num_steps(self) -> int:
        """Optimizer steps taken so far, vetoed ones included."""
        return self._step

    @property
    def outcome(self) -> StepOutcome:
        """What was decided of the last step that was given a closure."""
        return self._outcome

    @untraced
    def backward(
        self, losses: Mapping[str, Tensor] | Tensor, *, parts: int = 1, last: bool = True, batch_size: int = 1
    ) -> Tensor:
        """Run the backward of a loss, or of task losses with surgery between their gradients where that is on.

        Args:
            losses: of each task by name, still attached to the graph; or one loss, in which `split` may stand.
            parts: accumulated micro-batches, that the sum is divided by. A `scaler`'s scale comes on top.
            last: the optimizer steps after this micro-batch.
            batch_size: samples of the micro-batch, for the gradient noise scale.

        Returns:
            The sum, detached and without any scale; `step` takes it as the loss where it is given none.
        """
        scale = self._scale.read(self.scaler)
        factor = scale / parts
        if isinstance(losses, Tensor):
            total = losses
        elif self.session.tasks is None:
            total = sum(list(losses.values())[1:], start=next(iter(losses.values())))
        else:
            total = self.session.tasks.tasks.begin(losses)
        scaled = total * factor if factor != 1 else total
        self.session.before_backward(scaled, scale=scale, parts=parts)
        try:
            self._steppers[0].backward(scaled)
        finally:
            self.session.after_backward(last=last, scale=scale, parts=parts, batch_size=batch_size)
        self._losses.append(total.detach())
        return total.detach()

    @untraced
    def step(
        self,
        loss: Any = None,
        *,
        batch: Any = None,
        outputs: Any = None,
        targets: Any = None,
        optimizer: Optimizer | None = None,
    ) -> StepOutcome:
        """Measure, judge and treat the gradients in `.grad`, then let the optimizers step, unless vetoed.

        With a closure, as torch's `optimizer.step(closure)` takes it (LBFGS needs one), forward and backward run
        inside the optimizer's step: `loss = watch.step(closure)`. What its first evaluation gives is measured, judged
        and treated, and the decision stands for the whole step.

        Args:
            loss: of this step, unscaled: a tensor or a number. Or a closure.
            batch, outputs, targets: for rules that look at them; all optional.
            optimizer: the one that steps now, where several step each on its own; None: all.

        Returns:
            What was decided; with a closure the loss, as the optimizer's own `step` returns it (`outcome` has the
            decision).

        Raises:
            ConfigError: a closure for several optimizers, or under a loss scaler.
            TrainingStopped: a rule or treatment asked for a stop.
        """
        stepping = self._steppers if optimizer is None else chosen(self._steppers, optimizer)
        closure = None if loss is None or type(loss) is Tensor else closure_in(loss)
        if closure is not None:
            handed = {"batch": batch, "outputs": outputs, "targets": targets, "optimizer": optimizer}
            return self._step_with(closure, only_one(stepping, self.scaler), handed)
        if self._deepspeed is not None and self._deepspeed.has_stepped:
            self.after_step()
            return self._outcome
        if self._is_wrapped and not all(s.is_syncing for s in stepping):
            # Accelerate accumulates: its optimizers would not move now.
            self.micro_batch(loss, batch)
            for s in stepping:
                s.pass_over()
            return StepOutcome()
        if self.scaler is not None:
            for s in stepping:
                unscale(self.scaler, s.scaled)
        outcome = self.after_backward(loss, batch=batch, outputs=outputs, targets=targets, optimizer=optimizer)
        step_all(stepping, self.scaler, self.session.engine, outcome)
        self.after_step()
        return outcome

    def _step_came(self) -> None:
        """Measure a step that came before it was announced: Accelerate's backward lets DeepSpeed step, too."""
        if self._deepspeed is not None and self._deepspeed.has_stepped:
            self.after_step()
        self._micro_losses = []  # heard, and the last one's too
        self._outcome = self.after_backward()

    def _step_with(self, closure: Callable[[], Any], stepper: Stepper, handed: dict[str, Any]) -> Any:
        """Let an optimizer step that runs forward and backward by itself; return the loss."""
        if not stepper.is_syncing:
            loss = closure()
            self.micro_batch(loss, handed["batch"])
            return loss
        engine = self.session.engine
        number = None if handed["optimizer"] is None else self.optimizers.index(stepper.raw)
        if engine.is_left_open(self._step, number):
            self._end_left_open()

        def measure(loss: Any) -> StepOutcome:
            outcome = self._outcome = self.after_backward(loss, **handed)
            if engine.gates.is_open(stepper.raw) and not outcome.skip:
                engine.delivered.stepping(stepper.raw)
            return outcome

        evaluated = Evaluated(closure, measure)
        try:
            loss = stepper.step(evaluated)
        finally:
            engine.gates.over()
        if evaluated.outcome is None:
            name = type(stepper.raw).__name__
            engine.guard.limit(f"{name} never called the closure it was given", aloud=True)
        self.after_step()
        return loss

    @untraced
    def micro_batch(self, loss: Any = None, batch: Any = None) -> None:
        """Hand over what a micro-batch gave whose gradients accumulate; the last one of a step is `step`'s."""
        self.session.see(batch)
        self._micro_losses += [] if loss is None else [loss]
        self._num_samples += num_samples(batch)

    @untraced
    def after_backward(
        self,
        loss: Any = None,
        *,
        batch: Any = None,
        outputs: Any = None,
        targets: Any = None,
        optimizer: Optimizer | None = None,
    ) -> StepOutcome:
        """The first half of `step`, for those who step themselves: measure, judge, treat.

        Where the outcome says `skip`, the optimizer's next `step()` moves nothing.
        """
        known, stepping, scaler = self._steppers, self.optimizers, self.scaler
        if optimizer is not None:
            known = chosen(known, optimizer)
            stepping = tuple([s.raw for s in known])
        number = None if optimizer is None else self.optimizers.index(stepping[0])
        if self.session.engine.is_left_open(self._step, number):
            self._end_left_open()
        inputs = StepInputs(
            step=self._step,
            epoch=self._epoch,
            batch_idx=self._batch_idx,
            losses=self._micro_losses + (self._losses if loss is None else [loss]),
            batch=batch,
            outputs=outputs,
            targets=targets,
            num_samples=self._num_samples + num_samples(batch) if self._num_samples else 0,
            grad_scale=1.0 if scaler is None else scale_left_in_gradients(scaler, known[0].scaled),
            scaler=scaler is not None,
            scale=None if scaler is None else self._scale.read(scaler),
            scale_left=None if scaler is None else weakly(self._scale_left, 1.0),
            optimizer=number,
            scalars=self._extra,
        )
        if self._deepspeed is not None:
            self._deepspeed.describe(inputs)
        self._extra, self._losses, self._micro_losses, self._num_samples = {}, [], [], 0
        outcome = self.session.step(inputs, stepping)
        if outcome.requests:
            self._carry_out(outcome.requests)
        return outcome

    def _end_left_open(self) -> None:
        """End the step before where its optimizer raised, or the loop went on between the two halves: what comes now is
        another one, which is not to go unseen. A closure that its optimizer calls again announces no new one."""
        if self._deepspeed is None and not within_a_step():
            self.after_step()

    def _scale_left(self, optimizer: Optimizer) -> float | Tensor:
        known = next((s.scaled for s in self._steppers if s.raw is optimizer), optimizer)
        return scale_left_in_gradients(self.scaler, known)

    @untraced
    def after_step(self) -> None:
        """The second half of `step`: call it after the optimizer has stepped.

        Raises:
            TrainingStopped: a rule or treatment asked for a stop.
        """
        self.session.after_step()
        if self._deepspeed is not None:
            self._deepspeed.over()
        self._step += 1
        self.session.before_forward(self._step)
        if self.scaler is not None:
            self._scale.begin(self.scaler)
        if self.session.engine.treats_errors:
            self.session.engine.before_backward(self._scale.read(self.scaler))
        if self.session.engine.completion.late_requests:
            self._carry_out(self.session.take_requests())
        if self._stops:
            self._stop_if_asked()

    def batches(self, loader: Iterable[_Batch]) -> Iterator[_Batch]:
        """Give the batches of an epoch, and count them: records and case files then say which batch it was, and which
        samples of the data set, where the loader tells (see `RememberedBatches`).

        ```python
        for epoch in range(10):
            for x, y in watch.batches(loader):
                ...
        ```
        """
        epoch = self._epoch + 1
        for batch_idx, batch in enumerate(loader):
            self.at(epoch=epoch, batch_idx=batch_idx, loader=loader)
            self.session.see(batch)
            yield batch
        self.at(epoch=epoch)

    @untraced
    def at(self, *, epoch: int = -1, batch_idx: int = -1, loader: Any = None) -> None:
        """Say which batch goes on, for a loop that counts its own; `batches` does it for the others.

        Args:
            epoch: number of the epoch.
            batch_idx: number of the batch within it; of a step's last micro-batch.
            loader: that it came from: it may tell the samples.
        """
        self._epoch, self._batch_idx = epoch, batch_idx
        if loader is not None:
            self.session.cases.take_loader(loader)

    @untraced
    def validation(self, loss: Any = None, *, batch: Any = None, **metrics: Any) -> None:
        """Hand over validation values; they stand on the next step's record as `val_loss` and `val_<metric>`;
        after the last step, rules hear of them when the run ends.

        Args:
            loss: of the validation data.
            batch: one of its batches: size and spread of its inputs are compared with those of training.
            metrics: by name; anything that is one number.
        """
        given = {"loss": loss, **metrics}
        guard = self.session.engine.guard
        self._extra |= validation_scalars(given, guard, known=given)
        if batch is not None:
            self._extra |= validation_inputs(batch, guard)

    @untraced
    def record(self, **values: Any) -> None:
        """Put numbers of your own on the next step's record: `watch.record(kl=kl, reward=reward)`.

        Anything that is one number, a tensor among them (which is read: a wait, on a device). What is not is told once
        and left out. `gradwatch.records.add_column` makes a name a word of expressions.
        """
        self.session.record(values)

    def register(self, **objects: Any) -> None:
        """Let more go back with model and optimizers when a `Rollback` takes the training back: averaged models
        (`AveragedModel`, anything with `state_dict` and `load_state_dict`), schedulers, tensors, dicts of them.

        Raises:
            ConfigError: something that has no state.
        """
        self.session.register(objects)

    @untraced
    def annotate(
        self, text: str, *, silence: int = 0, paths: str | Sequence[str] = "*", rules: str | Sequence[str] = "*"
    ) -> None:
        """Put a note on record, and keep rules silent for `silence` steps (a data switch, a new schedule)."""
        self.session.annotate(text, silence=silence, paths=paths, rules=rules)

    @property
    def incidents(self) -> list[Incident]:
        """All incidents so far, as they stand now."""
        return self.session.incidents

    @property
    def history(self) -> list[StepRecord]:
        """The recent records, oldest first; bounded."""
        return self.session.history

    def verdict(self) -> Verdict:
        """Return whether all is well, or why that can't be said; see `gradwatch.verdict`."""
        return self.session.verdict()

    def __repr__(self) -> str:
        return f"Watch({type(self.session.model).__name__}, step {self._step})"

    def _repr_html_(self) -> str:
        return self.session.card().html()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.summary())

    def summary(self) -> str:
        """Return a text table of layers, and the incidents with advice."""
        return Text(self.session.summary(), self.session.card().html)

    def report(self, path: str | Path) -> Path:
        """Write the run as one self-contained file (.html, .md, .json or .png)."""
        from ..report import write_session

        written = write_session(self.session, path)
        self.session.sinks.report(written)
        return written

    def state_dict(self) -> dict[str, Any]:
        """Return windows, counters and the treatments' memory, as plain values and tensors."""
        # In a tuple: `torch.distributed.checkpoint` takes mappings apart, and then gives back no key but those that the
        # fresh one has already; a tuple it takes whole.
        return packed(self.session.state_dict(), self._step)

    def load_state_dict(self, state: Any) -> None:
        """Go on from a `state_dict`, on as many ranks as one likes.

        A state that can't be gone on from (damaged, of another release, of another model) gives one warning, and all
        begins afresh.
        """
        memory, step = unpacked(state)
        self.session.load_state_dict(memory)
        self._step = step
        self.session.sinks.resumed(step)
        self.session.engine.meter.disarm()
        self.session.before_forward(self._step)

    def close(self) -> None:
        """Take every hook off, write what is left, also where Ctrl-C falls into it. May be called twice.

        In a `finally` or an `except` the exception is put on record as what ended the run.

        Raises:
            TrainingStopped: a rule asked for a stop whose numbers came last from the device.
        """
        try:
            error = self._end(self._extra)
        except KeyboardInterrupt:  # on the way in; where it came later that is done
            self._end(self._extra)
            raise
        if error is None:
            self._take_last_requests()

    def __enter__(self) -> Watch:
        if self.session.tasks is not None:
            self._stack.enter_context(self.session.tasks.collecting())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end(self._extra, error=error)
        except KeyboardInterrupt:
            self._end(self._extra, error=error)
            raise
        if error is None:
            self._take_last_requests()

    def _take_last_requests(self) -> None:
        """Do what rules asked for at the last steps, whose numbers came when all was over."""
        self._carry_out(self.session.take_last_requests())
        self._stop_if_asked()

    def _carry_out(self, requests: Sequence[Request]) -> None:
        if not requests:
            return
        home = Home(self._stops.append, self._on_checkpoint, "Give `on_checkpoint`, a function of a file name.")
        for request in requests:
            self.session.carry_out(request, home)

    def _stop_if_asked(self) -> None:
        """End the training between two steps, where one of them was asked to be the last."""
        if self._stops:
            raise TrainingStopped(self._stops.pop(0).reason)


def _wrappers(steppers: Sequence[Stepper]) -> list[Any]:
    """Return optimizers of the user's own around those that are watched: they may keep weights of their own."""
    return [s.given for s in steppers if s.given is not s.raw and not is_transparent(s.given)]
