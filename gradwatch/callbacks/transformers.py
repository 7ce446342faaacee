"""The Hugging Face Trainer's events in, the engine's calls out."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import get_ident
from types import TracebackType
from typing import Any, ClassVar
from weakref import WeakSet

from torch import Tensor
from transformers import TrainerCallback

from .._closing import end_all, insist, why_ended
from ..errors import TrainingStopped
from ..protocols import Sink
from ..requests import Request, StopTraining
from ..torchside import engine_of, weakly
from ..watch import (
    BeforeStep,
    Ending,
    Forward,
    ForwardMemory,
    Home,
    IncidentTarget,
    RunDir,
    ScaleReader,
    Session,
    StepInputs,
    Stepper,
    checked_run_dir,
    describe_engine,
    forget_step,
    incident_target,
    resolve,
    run_dir_of,
    scale_left_in_gradients,
)
from ._backward_end import BackwardEnd, Pass
from ._door import SessionDoor
from ._elsewhere import Elsewhere
from ._evaluated import Evaluated
from ._left import is_running, when_left
from ._own_names import free_name
from ._say import say, say_ending
from ._transformers_run import BatchNumber, logging_steps, packed, sinks_of, unpacked

__all__ = ["GradWatchCallback"]

_WINDOWS = 8
"""Steps that are remembered for how many backwards they held."""


class GradWatchCallback(SessionDoor, TrainerCallback):
    """Watches a Hugging Face Trainer's gradients, and acts if asked. Observing changes no bit of the training.

    ```python
    trainer = Trainer(model, args, train_dataset=data, callbacks=[GradWatchCallback()])
    ```

    Gradients are measured and treated when the last backward of an accumulation window is over (of several in one
    `training_step`: as many as any recent step had): before the Trainer's own clip (`max_grad_norm`, 1.0 unless
    changed), which then clips what the treatments left. In the first window, when nobody knows yet how many backwards
    come, and where fewer came, treatments act after that clip. Records hold `trainer_clip`, that bound, and
    `global_norm_applied`, the norm that the optimizer got; what the Trainer logs as `grad_norm` lies between the two.
    The state goes into the checkpoints' `trainer_state.json`.

    The Trainer has no event for an exception: after one, and after Ctrl-C, the hooks come off as soon as nobody holds
    its traceback; `with GradWatchCallback() as watch:` takes them off at once, and puts the reason on record.

    Args:
        rules: `"observe"`, `"default"`, `"autoclip"`, a rules file, a list of rules or a `RuleBook`.
        treatments: for every step, beside those that rules ask for.
        surgery: between the task losses that the model, or `compute_loss`, hands to `gradwatch.split(a=..., b=...)`.
        run_dir: folder for records and incidents; None: `<output_dir>/<name>`; False: none.
        sinks: where records go; None: TensorBoard, W&B and MLflow as `report_to` says. TensorBoard's events lie in
            `<output_dir>/runs/<name>`, a run of their own: two writers in one folder hide each other's events.
        log_every: optimizer steps between two log entries; None: the Trainer's `logging_steps`.
        on_incident: told of incidents in a thread of its own: a callable, an http(s) address or `"module:function"`.
        name: of this callback: its tags and its state in checkpoints begin with it. A second one of the same name in a
            training goes by `<name>-2`.
        verbose: print incidents and the summary.
        **options: `live` as in `Watch`; and see `MeasureOptions`.

    Raises:
        ConfigError: a setting that can't be, with the nearest valid names.
    """

    _starter = "trainer.train"
    _living: ClassVar[WeakSet[Any]] = WeakSet()

    def __init__(
        self,
        rules: Any = "default",
        *,
        treatments: Any = (),
        run_dir: RunDir = None,
        sinks: Sequence[Sink] | None = None,
        log_every: int | None = None,
        on_incident: IncidentTarget | None = None,
        name: str = "gradwatch",
        verbose: bool = True,
        **options: Any,
    ) -> None:
        given = {"rules": rules, "treatments": treatments, "sinks": sinks, "log_every": log_every, "name": name}
        self.settings = resolve(**given, **options)
        self._run_dir, self._verbose = checked_run_dir(run_dir), verbose
        self._on_incident = incident_target(on_incident)
        self._session: Session | None = None
        self._elsewhere = Elsewhere()
        self._ends: BackwardEnd | None = None
        self._forwards: list[ForwardMemory] = []
        self._deepspeed: BeforeStep | None = None
        self._stepper: Stepper | None = None
        self._requests: list[Request] = []
        self._scalars: dict[str, float] = {}
        self._evaluated = Evaluated()
        self._batch_number = BatchNumber()
        self._scale = ScaleReader()
        self._counts: deque[int] = deque(maxlen=_WINDOWS)
        self._own_name = name
        self._collecting: ExitStack | None = None
        self._training: weakref.ref[Any] | None = None
        self._begin_step(0)

    def _begin_step(self, step: int) -> None:
        self._step, self._measured, self._num_samples = step, False, 0
        self._num_backwards = self._num_parts = 0
        self._batch: Any = None
        self._told: dict[str, float] = {}
        self._losses: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._is_watching(state):
            return  # listed twice
        self.close()
        self._scalars = {}
        self._own_name = self._free_name(state)
        self._training = weakref.ref(state)
        self._living.add(self)
        saved = _saved(state, self._key) if state.global_step else None
        self._stepper = Stepper(kwargs["optimizer"])
        if (engine := engine_of(model)) is not None:
            self._deepspeed = BeforeStep(engine, weakly(self._on_deepspeeds_step))
        sinks = self.settings.sinks
        if sinks is None:
            sinks = tuple(sinks_of(args, self._own_name) if state.is_world_process_zero else ())
        session = self._session = Session(
            model,
            [self._stepper.raw],
            replace(self.settings, name=self._own_name),
            sinks=sinks,
            run_dir=self._folder(args, fresh=saved is None),
            log_every=self.settings.log_every or logging_steps(args, state),
            say=say if self._verbose else lambda line: None,
            on_incident=self._on_incident,
            start_step=state.global_step,
        )
        scheduler = kwargs.get("lr_scheduler")
        session.restores(scaler=self._stepper.scaler, schedulers=lambda: [] if scheduler is None else [scheduler])
        session.register(self._registered)
        if saved is not None:
            session.load_state_dict(unpacked(saved))
        session.engine.gates.know([self._stepper.given])
        # Under DeepSpeed it is DeepSpeed that clips.
        self._clip = float(args.max_grad_norm or 0.0) if self._deepspeed is None else 0.0
        if state.is_world_process_zero:
            self._elsewhere.tell(session.run_dir)
        when_left("train", "transformers", self._left)
        self._thread = get_ident()
        self._ends = BackwardEnd(session.model, self._on_backward_end, self._look)
        self._ends.is_muted = weakly(self._is_muted, False)
        self._forwards = session.engine.listen_to_forwards(session.model)
        session.begin()
        if session.tasks is not None:
            tasks = session.tasks
            self._collecting = ExitStack()
            self._collecting.enter_context(tasks.collecting())
        self._begin_step(state.global_step)

    def _is_muted(self) -> bool:
        session = self._session
        if session is None:
            return False
        return session.engine.is_replaying or (session.tasks is not None and session.tasks.tasks.probing)

    def _is_watching(self, state: Any) -> bool:
        return self._training is not None and self._training() is state and not getattr(self._session, "closed", True)

    def _free_name(self, state: Any) -> str:
        # The Trainer tells its callbacks nothing of each other.
        taken = {other._own_name for other in list(self._living) if other is not self and other._is_watching(state)}
        return free_name(self.settings.name, taken)

    def _folder(self, args: Any, *, fresh: bool) -> Path | None:
        return run_dir_of(self._run_dir, self._own_name, Path(args.output_dir), fresh=fresh)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        if self._session is not None:
            self._batch_number.begin_epoch(args, state, train_dataloader)
            self._session.cases.take_loader(train_dataloader)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._session is not None:
            self._epoch = int(state.epoch or 0)
            self._begin_step(state.global_step)
            if self._stepper is not None:
                self._scale.begin(self._stepper.scaler)
            self._session.before_forward(state.global_step)

    def _look(self, batch: Any, outputs: Any) -> Forward:
        session = self._session
        if session is None:
            return Forward()
        if get_ident() == self._thread and not is_running("train", "transformers"):
            # Its loop was left by an exception that somebody holds, with all of its frames: this is another's forward.
            self._left()
            return Forward()
        if isinstance(batch, dict):
            batch.pop("num_items_in_batch", None)
        return session.look(batch, outputs)

    def _on_backward_end(self, seen: Pass) -> None:
        session, stepper = self._session, self._stepper
        if session is None or stepper is None:
            return
        if seen.num_backwards == 1:
            self._num_samples += session.count_samples(seen.seen)
        if seen.loss is not None and seen.weight is not None:
            # Some losses come divided by the window's micro-batches, some by its tokens: what reaches backward counts.
            self._losses.append(seen.loss * seen.weight)
        if self._deepspeed is not None:
            self._batch = seen.seen  # gradients are not complete yet
            return
        self._num_backwards += stepper.is_syncing
        self._between_micro_batches(seen)
        if not stepper.is_syncing:
            return
        is_first = not self._counts and session.engine.treats
        if self._num_backwards == max(self._counts, default=1) and not is_first:
            self._measure(seen.seen)
        else:
            self._batch, self._measured = seen.seen, False

    def _between_micro_batches(self, seen: Pass) -> None:
        """Take this micro-batch's gradient, and put the combined one in its place after the last."""
        session, stepper = self._session, self._stepper
        if session is None or stepper is None or session.tasks is None or session.tasks.micro is None:
            return
        self._num_parts += seen.num_backwards == 1
        session.after_backward(
            last=self._num_backwards == max(self._counts, default=1),
            scale=self._scale.read(stepper.scaler),
            # The Trainer divides by the micro-batches of this window, of which the last one may have fewer.
            parts=self._num_parts,
            batch_size=session.count_samples(seen.seen),
        )

    def _measure(self, batch: Any = None) -> None:
        session, stepper = self._session, self._stepper
        assert session is not None
        assert stepper is not None
        scaler, parts = stepper.scaler, len(self._losses)
        scale = self._scale.read(scaler)
        self._measured = True
        scalars, self._scalars = self._scalars, {}
        self._told = dict(scalars)
        if self._clip > 0:
            scalars["trainer_clip"] = self._clip
        inputs = StepInputs(
            step=self._step,
            epoch=self._epoch,
            batch_idx=self._batch_number.now,
            losses=[loss * (parts / scale) for loss in self._losses],
            batch=batch,
            num_samples=self._num_samples,
            grad_scale=1.0 if scaler is None else scale_left_in_gradients(scaler, stepper.raw),
            scaler=scaler is not None,
            scale=None if scaler is None else scale,
            scale_left=None if scaler is None else partial(scale_left_in_gradients, scaler),
            clipper=f"the Trainer's max_grad_norm={self._clip:g}" if self._clip > 0 else "",
            scalars=scalars,
        )
        if self._deepspeed is not None:
            describe_engine(self._deepspeed.engine, inputs)
        self._requests += session.step(inputs).requests

    def _on_deepspeeds_step(self) -> None:
        """DeepSpeed has put the gradients together, and steps next: all that in the Trainer's call of backward."""
        if self._deepspeed is not None and self._session is not None:
            # Divided already for the mean over micro-batches, or over tokens.
            self._losses = self._deepspeed.losses or self._losses
            self._measure(self._batch)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        session = self._session
        if session is None or self._deepspeed is not None:
            return
        if self._num_backwards:
            self._counts.append(self._num_backwards)
        if self._measured:
            return
        if self._num_backwards:
            # What was measured, if anything, was not the whole.
            forget_step(session.engine)
            self._requests, self._scalars = [], self._told | self._scalars
            self._measure(self._batch)
        else:
            # The model's own forward was not called, or returned nothing to hook.
            self._measure()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batch_number.over()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batch_number.over()
        session = self._session
        if session is None:
            return
        session.after_step()
        self._losses = []
        requests, self._requests = self._requests + session.take_requests(), []
        self._carry_out(session, control, requests)
        if control.should_save or str(getattr(args.save_strategy, "value", args.save_strategy)) == "best":
            state.stateful_callbacks[self._key] = packed(session.state_dict())

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._session is not None and control.should_save:
            state.stateful_callbacks[self._key] = packed(self._session.state_dict())

    def _carry_out(self, session: Session, control: Any, requests: Sequence[Request], *, ends: bool = False) -> None:
        def save(filename: str) -> None:  # the Trainer gives its checkpoints names of its own
            control.should_save = True

        def stop(request: StopTraining) -> None:
            if self._verbose:
                say(f"gradwatch {request.reason}")
            if request.as_error:
                self._close(f"stopped: {request.reason}")
                raise TrainingStopped(request.reason)
            control.should_training_stop = True

        home = Home(stop, None if ends else save, "The Trainer writes none once training is over.")
        for request in requests:
            session.carry_out(request, home)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self._is_watching(state) and self._session is not None:
            self._scalars |= self._evaluated.scalars(metrics, self._session.engine.guard)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        session = self._session
        if session is None or session.closed:
            return
        scalars, self._scalars = self._scalars, {}
        Ending(session, self._let_go)(scalars)
        if self._verbose and state.is_world_process_zero:
            say_ending(session)
        self._carry_out(session, control, session.take_last_requests(), ends=True)

    @property
    def _key(self) -> str:
        return f"gradwatch:{self._own_name}"

    def close(self) -> None:
        """Take every hook off, write what is left. May be called twice."""
        self._close("")

    def _close(self, why: str) -> None:
        session = self._session
        insist(partial(end_all, self._let_go, *([] if session is None else [partial(session.close, why)])))

    def _let_go(self) -> None:
        # Forgotten last: what Ctrl-C stops on the way is done by the next call.
        if self._collecting is not None:
            self._collecting.close()
        if self._ends is not None:
            self._ends.close()
        for forwards in self._forwards:
            forwards.close()
        if self._deepspeed is not None:
            self._deepspeed.close()
        self._ends, self._forwards, self._collecting, self._deepspeed, self._losses = None, [], None, None, []

    def _left(self) -> None:
        # The Trainer has no event for an exception: its loop is left, and `on_train_end` was not called.
        self._close("crashed or interrupted")

    def __enter__(self) -> GradWatchCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(*([] if error is None else [Exception])):
            self._close(why_ended(error))

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_session": None,
            "_ends": None,
            "_forwards": [],
            "_collecting": None,
            "_deepspeed": None,
            "_stepper": None,
            "_losses": [],
            "_scale": ScaleReader(),
            "_training": None,
        }


def _saved(state: Any, key: str) -> Any:
    """Return what a checkpoint holds under our key; None where it holds nothing."""
    held = state.stateful_callbacks
    return held.get(key) if isinstance(held, Mapping) else None
