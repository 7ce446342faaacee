"""The Hugging Face Trainer's events in, the engine's calls out."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..errors import ConfigError, TrainingStopped
from ..protocols import Request, Sink
from ..sinks import sinks_for_loggers
from ..watch import (
    IncidentTarget,
    ScaleReader,
    Session,
    StepInputs,
    Stepper,
    incident_target,
    resolve,
    scale_left_in_gradients,
)
from ._backward_end import BackwardEnd, Pass
from ._door import SessionDoor
from ._run_dir import free_run_dir
from ._say import say, say_ending

__all__ = ["GradWatchCallback"]

_TRAINERS = ("runtime", "per_second", "epoch", "num_input_tokens_seen", "total_flos", "compilation_time")
"""What the Trainer adds to the metrics of an evaluation."""
_ELSEWHERE = ("surgery", "conflicts_every", "autopsy")


class GradWatchCallback(SessionDoor, TrainerCallback):
    """Watches a Hugging Face Trainer's gradients, and acts if asked. Observing changes no bit of the training.

    ```python
    trainer = Trainer(model, args, train_dataset=data, callbacks=[GradWatchCallback()])
    ```

    Gradients are measured and treated when the last backward of an accumulation window is over: before the Trainer's
    own clip (`max_grad_norm`, 1.0 unless changed), which then clips what the treatments left. Records hold
    `trainer_clip`, that bound, and `global_norm_applied`, the norm that the optimizer got; what the Trainer logs as
    `grad_norm` lies between the two. The state goes into the checkpoints' `trainer_state.json`.

    The Trainer has no event for an exception: `with GradWatchCallback() as watch:` takes the hooks off then, too.

    Args:
        rules: `"observe"`, `"default"`, `"autoclip"`, a rules file, a list of rules or a `RuleBook`.
        treatments: for every step, beside those that rules ask for.
        run_dir: folder for records and incidents; None: `<output_dir>/<name>`; False: none.
        sinks: where records go; None: TensorBoard, W&B and MLflow as `report_to` says. TensorBoard's events lie in
            `<output_dir>/runs/<name>`, a run of their own: two writers in one folder hide each other's events.
        log_every: optimizer steps between two log entries; None: the Trainer's `logging_steps`.
        on_incident: told of incidents in a thread of its own: a callable, an http(s) address or `"module:function"`.
        name: of this callback: its tags and its state in checkpoints begin with it.
        verbose: print incidents and the summary.
        **options: see `MeasureOptions`.

    Raises:
        ConfigError: a setting that can't be, with the nearest valid names.
    """

    _starter = "trainer.train"

    def __init__(
        self,
        rules: Any = "default",
        *,
        treatments: Any = (),
        run_dir: str | Path | bool | None = None,
        sinks: Sequence[Sink] | None = None,
        log_every: int | None = None,
        on_incident: IncidentTarget | None = None,
        name: str = "gradwatch",
        verbose: bool = True,
        **options: Any,
    ) -> None:
        for option in _ELSEWHERE:
            if options.get(option):
                raise ConfigError(
                    f"`{option}` needs an event before backward, which the Trainer does not have. It works in Watch "
                    "and in the Lightning callback."
                )
        given = {"rules": rules, "treatments": treatments, "sinks": sinks, "log_every": log_every, "name": name}
        self.settings = resolve(**given, **options)
        self._run_dir, self._verbose = run_dir, verbose
        self._on_incident = incident_target(on_incident)
        self._session: Session | None = None
        self._ends: BackwardEnd | None = None
        self._stepper: Stepper | None = None
        self._requests: list[Request] = []
        self._scalars: dict[str, float] = {}
        self._scale = ScaleReader()
        self._begin_step(0)

    def _begin_step(self, step: int) -> None:
        self._step, self._measured, self._num_samples = step, False, 0
        self._losses: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        carried = _unpacked(state.stateful_callbacks.get(self._key)) if state.global_step else None
        self.close()
        self._stepper = Stepper(kwargs["optimizer"])
        sinks = self.settings.sinks
        if sinks is None:
            sinks = tuple(_sinks(args, self.settings.name) if state.is_world_process_zero else ())
        self._session = Session(
            model,
            [self._stepper.raw],
            self.settings,
            sinks=sinks,
            run_dir=self._folder(args, fresh=carried is None),
            log_every=self.settings.log_every or _logging_steps(args, state),
            say=say if self._verbose else lambda line: None,
            on_incident=self._on_incident,
            start_step=state.global_step,
        )
        if carried is not None:
            self._session.load_state_dict(carried)
        self._clip = float(args.max_grad_norm or 0.0)
        self._ends = BackwardEnd(self._session.model, self._on_backward_end)
        self._begin_step(state.global_step)

    def _folder(self, args: Any, *, fresh: bool) -> Path | None:
        if self._run_dir is False:
            return None
        if isinstance(self._run_dir, (str, Path)):
            return Path(self._run_dir)
        folder = Path(args.output_dir) / self.settings.name
        return free_run_dir(folder) if fresh else folder

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._session is not None:
            self._epoch = int(state.epoch or 0)
            self._begin_step(state.global_step)
            if self._stepper is not None:
                self._scale.begin(self._stepper.scaler)
            self._session.before_forward(state.global_step)

    def _on_backward_end(self, seen: Pass) -> None:
        session, stepper = self._session, self._stepper
        if session is None or stepper is None or self._measured:
            return
        batch = {k: v for k, v in seen.batch.items() if k != "num_items_in_batch"}
        self._num_samples += session.count_samples(batch)
        if seen.loss is not None and seen.weight is not None:
            # Some losses come divided by the window's micro-batches, some by its tokens: what reaches backward counts.
            self._losses.append(seen.loss * seen.weight)
        if stepper.is_syncing:
            self._measure(batch, seen.outputs, batch.get("labels"))

    def _measure(self, batch: Any = None, outputs: Any = None, targets: Any = None) -> None:
        session, stepper = self._session, self._stepper
        assert session is not None
        assert stepper is not None
        scaler, parts = stepper.scaler, len(self._losses)
        scale = self._scale.read(scaler)
        self._measured = True
        scalars, self._scalars = self._scalars, {}
        if self._clip > 0:
            scalars["trainer_clip"] = self._clip
        inputs = StepInputs(
            step=self._step,
            epoch=self._epoch,
            losses=[loss * (parts / scale) for loss in self._losses],
            batch=batch,
            outputs=outputs,
            targets=targets,
            num_samples=self._num_samples,
            grad_scale=1.0 if scaler is None else scale_left_in_gradients(scaler, stepper.raw),
            scaler=scaler is not None,
            scale=None if scaler is None else scale,
            scalars=scalars,
        )
        self._requests += session.step(inputs).requests

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._session is not None and not self._measured:
            # The model's own forward was not called, or returned nothing to hook.
            self._session.engine.guard.failed.setdefault(
                "measuring before the Trainer's own clip", "no backward was seen through the model's outputs"
            )
            self._clip = 0.0
            self._measure()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        session = self._session
        if session is None:
            return
        session.after_step()
        requests, self._requests = self._requests + session.take_requests(), []
        for request in requests:
            self._carry_out(session, control, request)
        if control.should_save or str(getattr(args.save_strategy, "value", args.save_strategy)) == "best":
            state.stateful_callbacks[self._key] = _packed(session.state_dict())

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._session is not None and control.should_save:
            state.stateful_callbacks[self._key] = _packed(self._session.state_dict())

    def _carry_out(self, session: Session, control: Any, request: Request) -> None:
        session.carry_out(request)
        if request.kind == "checkpoint":
            control.should_save = True
        elif request.kind == "stop":
            if self._verbose:
                say(f"gradwatch {request.reason}")
            if request.values.get("error"):
                self.close()
                raise TrainingStopped(request.reason)
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        for key, value in (metrics or {}).items():
            word = key.removeprefix("eval_")
            if isinstance(value, (int, float)) and not any(own in word for own in _TRAINERS):
                self._scalars[f"val_{word.replace('/', '_')}"] = float(value)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        session = self._session
        if session is None or session.closed:
            return
        session.finish(self._scalars)
        self._scalars = {}
        self.close()
        if self._verbose and state.is_world_process_zero:
            say_ending(session)

    @property
    def _key(self) -> str:
        return f"gradwatch:{self.settings.name}"

    def close(self) -> None:
        """Take every hook off, write what is left. May be called twice."""
        if self._ends is not None:
            self._ends.close()
            self._ends = None
        if self._session is not None:
            self._session.close()

    def __enter__(self) -> GradWatchCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_session": None,
            "_ends": None,
            "_stepper": None,
            "_losses": [],
            "_scale": ScaleReader(),
        }


def _logging_steps(args: Any, state: Any) -> int:
    # Below 1 it is a share of the run; TrainerState holds the steps that came of it.
    return max(1, int(getattr(state, "logging_steps", None) or args.logging_steps))


def _sinks(args: Any, name: str) -> list[Sink]:
    """Return sinks beside the integrations that `report_to` names; those have begun their runs by now."""
    loggers: list[Any] = []
    if "tensorboard" in args.report_to:
        from torch.utils.tensorboard import SummaryWriter

        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or Path(args.output_dir) / "runs"
        loggers.append(SummaryWriter(str(Path(folder).expanduser() / name)))
    if "wandb" in args.report_to:
        import wandb

        loggers += [wandb.run] if wandb.run is not None else []
    sinks = sinks_for_loggers(loggers, name=name)
    if "mlflow" in args.report_to:
        import mlflow

        from ..sinks import MlflowSink

        run = mlflow.active_run()
        if run is not None:
            sinks.append(MlflowSink(mlflow.MlflowClient(), run.info.run_id, name=name))
    return sinks


def _packed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state as JSON can hold it, in the form that the Trainer keeps callbacks' states in."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return {"args": {}, "attributes": {"state": base64.b64encode(buffer.getvalue()).decode()}}


def _unpacked(saved: Any) -> dict[str, Any] | None:
    text = (saved or {}).get("attributes", {}).get("state")
    return None if text is None else torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
