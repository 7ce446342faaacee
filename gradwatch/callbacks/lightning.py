"""Lightning's events in, the engine's calls out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .._preflight import PreflightReport, check_lightning
from ..errors import TrainingStopped
from ..protocols import Request
from ..records import Incident
from ..watch import ScaleReader, Session, StepInputs, StepOutcome, incident_target, resolve, scale_left_in_gradients
from ._bar import NumberInBar
from ._door import SessionDoor
from ._lightning_base import callback_bases
from ._lightning_run import choose_run_dir, open_session, validation_scalars
from ._quiet import run_quietly
from ._say import say, say_ending

__all__ = ["GradWatch"]

_Callback: Any = type("_Callback", callback_bases(), {})


class GradWatch(SessionDoor, _Callback):
    """Watches a Lightning run's gradients, layer by layer, and acts if asked. Observing changes no bit of the training.

    ```python
    trainer = Trainer(callbacks=[GradWatch()])                     # observe with the default rules; change nothing
    trainer = Trainer(callbacks=[GradWatch(rules="autoclip")])     # a preset that also treats
    ```

    During and after a fit: `incidents`, `history`, `summary()`, `report(path)`.

    Args:
        rules: `"observe"`, `"default"`, `"autoclip"`, a rules file, a list of rules or a `RuleBook`.
        treatments: for every step, beside those that rules ask for.
        surgery: between task gradients: a method's name (`"pcgrad"`) or a `Surgery`.
        paths: glob patterns of the parameters and modules to watch.
        every: measure at one optimizer step in this many.
        activations_every: sample modules' outputs and grad_outputs; None never.
        updates_every: measure update ratios; None never.
        histograms_every: gradient histograms and details; None never.
        log_every: optimizer steps between two log entries; None: the Trainer's `log_every_n_steps`.
        backward: `"tensor"` or `"full"` backward hooks.
        memory_limit_mb: what may be held beyond the model.
        on_error: `"warn"` or `"raise"`.
        run_dir: folder for records and incidents; None: `<log_dir>/<name>`; False: none.
        sinks: where records go; None: the Trainer's loggers.
        name: of this callback: its tags and its state in checkpoints begin with it.
        histogram_scale: `"log10"` of the magnitude, or `"signed"`.
        autopsy: on the first non-finite incident find out where it was born, by running the batch again under hooks.
        preflight: check model and first batch before step 0.
        conflicts_every: measure conflicts between task losses without surgery; None never.
        history: records kept in `history`.
        local_norms: also measure each rank's own gradient norms.
        on_incident: told of incidents in a thread of its own: a callable (each one, when it opens and when it is over),
            an http(s) address that takes a POST of JSON, or `"module:function"`.
        verbose: print incidents and the summary.

    Raises:
        ConfigError: a setting that can't be, with the nearest valid names.
    """

    def __init__(  # noqa: PLR0913 - a door: flat names, resolved at once
        self,
        rules: Any = "default",
        *,
        treatments: Any = None,
        surgery: Any = None,
        paths: str | Sequence[str] = "*",
        every: int = 1,
        activations_every: int | None = 50,
        updates_every: int | None = 50,
        histograms_every: int | None = 100,
        log_every: int | None = None,
        backward: str = "tensor",
        memory_limit_mb: float = 256,
        on_error: str = "warn",
        run_dir: str | Path | bool | None = None,
        sinks: Any = None,
        name: str = "gradwatch",
        histogram_scale: str = "log10",
        autopsy: bool = False,
        preflight: bool = False,
        conflicts_every: int | None = None,
        history: int = 1000,
        local_norms: bool = False,
        on_incident: Callable[[Incident], Any] | str | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self.settings = resolve(
            rules=rules,
            treatments=treatments,
            surgery=surgery,
            paths=paths,
            every=every,
            activations_every=activations_every,
            updates_every=updates_every,
            histograms_every=histograms_every,
            log_every=log_every,
            backward=backward,
            memory_limit_mb=memory_limit_mb,
            on_error=on_error,
            sinks=sinks,
            name=name,
            histogram_scale=histogram_scale,
            autopsy=autopsy,
            conflicts_every=conflicts_every,
            history=history,
            local_norms=local_norms,
        )
        self._run_dir = run_dir
        self._on_incident = incident_target(on_incident)
        self._preflight = preflight
        self.preflight_report: PreflightReport | None = None
        self._verbose = verbose
        self._session: Session | None = None
        self._state: dict[str, Any] | None = None
        self._losses: list[Tensor] = []
        self._num_samples = 0
        self._batch: Any = None
        self._batch_idx = -1
        self._scalars: dict[str, float] = {}
        self._scale = ScaleReader()
        self._requests: list[Request] = []
        self._bar = NumberInBar(f"{self.settings.name}/norm", self._latest_norm)

    @property
    def state_key(self) -> str:
        return f"gradwatch:{self.settings.name}"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        carried = self._state
        if self._session is not None:
            if carried is None and trainer.global_step > 0:
                carried = self._session.state_dict()
            self._session.close()
        self._session = open_session(
            trainer,
            pl_module,
            self.settings,
            run_dir=choose_run_dir(trainer, self._run_dir, self.settings.name, fresh=carried is None),
            say=lambda line: self._say(trainer, line),
            on_incident=self._on_incident,
        )
        if carried is not None:
            self._session.load_state_dict(carried)
        self._state = None
        self._session.begin(pl_module)
        self._bar.attach(trainer.progress_bar_callback)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._session is not None:
            if self._preflight and trainer.global_step == 0 and self.preflight_report is None:
                self._check(pl_module, batch)
            self._batch, self._batch_idx = batch, batch_idx
            self._scale.begin(self._scaler(trainer))
            self._session.before_forward(trainer.global_step)
            if self.settings.options.autopsy and pl_module.automatic_optimization:
                self._session.engine.remember(lambda: run_quietly(pl_module, batch, batch_idx))

    def _check(self, pl_module: Any, batch: Any) -> None:
        session = self._session
        assert session is not None
        with session.engine.guard("the pre-flight"):
            self.preflight_report = check_lightning(pl_module, batch)
            for incident in self.preflight_report.incidents():
                session.engine.judge.report(incident)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if self._session is None:
            return
        parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        scaler = self._scaler(trainer)
        # Divided for accumulation already, and multiplied by the scaler.
        scale = self._scale.read(scaler)
        self._losses.append(loss.detach() * (parts / scale) if parts != scale else loss.detach())
        self._num_samples += self._session.count_samples(self._batch)
        self._session.before_backward(loss, scale=scale, parts=parts)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        session = self._session
        if session is None or session.tasks is None:
            return
        parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        scaler = self._scaler(trainer)
        session.after_backward(
            last=parts == 1 or not trainer.fit_loop._should_accumulate(),
            scale=self._scale.read(scaler),
            parts=parts,
            batch_size=session.count_samples(self._batch),
        )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        session = self._session
        if session is None:
            return
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        scaler = self._scaler(trainer)
        several = len(trainer.optimizers) > 1
        inputs = StepInputs(
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            batch_idx=self._batch_idx,
            losses=self._losses,
            batch=self._batch,
            num_samples=self._num_samples,
            grad_scale=1.0 if scaler is None else scale_left_in_gradients(scaler, optimizer),
            scaler=scaler is not None,
            scale=None if scaler is None else self._scale.read(scaler),
            optimizer=session.optimizer_number(optimizer) if several else None,
            scalars=self._scalars,
        )
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm in (None, "norm"):
            inputs.scalars["trainer_clip"] = float(trainer.gradient_clip_val)
        self._scalars = {}
        if pl_module.automatic_optimization:
            # A closure called again (LBFGS) brings its own losses.
            self._losses, self._num_samples = [], 0
        outcome: StepOutcome = session.step(inputs, [optimizer] if several else None)
        self._requests += outcome.requests

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        session = self._session
        if session is None:
            return
        if not pl_module.automatic_optimization:
            self._losses, self._num_samples = [], 0
        self._batch = None
        session.after_step()
        requests, self._requests = self._requests + session.take_requests(), []
        for request in requests:
            self._carry_out(trainer, request)

    def _latest_norm(self) -> float | None:
        history = self._session.engine.completion.history if self._session is not None else None
        return float(history[-1].global_norm) if history else None

    def _carry_out(self, trainer: Any, request: Request) -> None:
        assert self._session is not None
        self._session.carry_out(request)
        if request.kind == "checkpoint":
            folder = self._session.run_dir or Path(trainer.default_root_dir)
            with self._session.engine.guard("writing a checkpoint"):
                trainer.save_checkpoint(folder / f"{request.values.get('filename', 'gradwatch')}.ckpt")
        elif request.kind == "stop":
            self._say(trainer, f"gradwatch {request.reason}")
            if request.values.get("error"):
                raise TrainingStopped(request.reason)
            trainer.should_stop = True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._session is None or trainer.sanity_checking:
            return
        self._scalars |= validation_scalars(trainer.callback_metrics)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._session is None:
            return
        self._session.finish(self._scalars)
        self._scalars = {}
        if self._verbose and trainer.is_global_zero and not trainer.fast_dev_run:
            say_ending(self._session)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        # On an exception or Ctrl-C this alone runs: no teardown (H23).
        self._bar.detach()
        if self._session is not None:
            self._session.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._bar.detach()
        if self._session is not None and stage == "fit":
            self._session.close()

    def state_dict(self) -> dict[str, Any]:
        if self._session is not None:
            return self._session.state_dict()
        return self._state or {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        # Comes before `on_train_start` for one device and DDP, and for FSDP too (O7); never reset there.
        self._state = dict(state_dict)
        if self._session is not None and not self._session.closed:
            self._session.load_state_dict(self._state)
            self._state = None

    def _say(self, trainer: Any, line: str) -> None:
        if not self._verbose or not trainer.is_global_zero:
            return
        bar = trainer.progress_bar_callback
        say(line, print if bar is None else bar.print)

    def _scaler(self, trainer: Any) -> Any:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def __getstate__(self) -> dict[str, Any]:
        # Spawned processes get the callback as it was before the fit (O8).
        return {**self.__dict__, "_session": None, "_losses": [], "_batch": None, "_scale": ScaleReader()}
