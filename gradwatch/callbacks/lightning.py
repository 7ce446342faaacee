"""Lightning's events in, the engine's calls out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial, update_wrapper
from typing import Any

from torch import Tensor

from .._closing import end_all, insist, why_ended
from .._preflight import PreflightReport
from ..records import Incident
from ..requests import Request
from ..watch import (
    IncidentTarget,
    RunDir,
    ScaleReader,
    Session,
    StepInputs,
    StepOutcome,
    checked_run_dir,
    incident_target,
    resolve,
    validation_inputs,
)
from . import _lightning_run as lightning_run
from ._bar import NumberInBar
from ._door import SessionDoor
from ._elsewhere import Elsewhere
from ._left import when_left
from ._lightning_base import callback_bases
from ._own_names import own_names
from ._quiet import run_quietly
from ._say import say_beside, say_ending

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
        statistics: your own measurements: `gradwatch.stats.Statistic` objects, or names of registered ones.
        paths: glob patterns of the parameters and modules to watch.
        every: measure at one optimizer step in this many.
        activations_every: sample modules' outputs and grad_outputs; None never.
        updates_every: measure update ratios; None never.
        histograms_every: gradient histograms and details; None never.
        log_every: optimizer steps between two log entries; None: the Trainer's `log_every_n_steps`.
        backward: `"tensor"` or `"full"` backward hooks.
        memory_limit_mb: what may be held beyond the model.
        on_error: `"warn"` or `"raise"`.
        run_dir: folder for records and incidents; None: `<name>` in the first logger's folder, without a logger in
            the `default_root_dir` given to the Trainer, and none without that too; True: in the working directory
            then; False: none.
        sinks: where records go; None: the Trainer's loggers.
        name: of this callback: its tags and its state in checkpoints begin with it. A second one of the same name in a
            Trainer goes by `<name>-2`.
        histogram_scale: `"log10"` of the magnitude, or `"signed"`.
        autopsy: on a non-finite or exploding gradient find out where it was born, and there and where the loss jumps
            which samples carry it, by running the batch again.
        noise_scale: measure the gradient noise scale, which tells what batch size is worth its price, now and then.
        what_if: at the first critical incident try the training again, from before it, with one thing changed at a
            time, to say which change cures it; see `gradwatch.what_if`.
        recompute_every: run a step's batch again, to see whether it gives the same gradient; None never.
        replicas_every: compare the ranks' weights and gradients bit for bit; None never.
        fingerprints: know batches again: whether they come in the same order over and over.
        preflight: check model and first batch before step 0.
        conflicts_every: measure conflicts between task losses without surgery; None never.
        history: records kept in `history`.
        local_norms: also measure each rank's own gradient norms.
        kind: what kind of training it is, which rules follow; `"auto"`: as model, loss and optimizers show it.
        save_batch: save the batch of the step at which an incident began, beside its case file; see `MeasureOptions`.
        stop_on_unproven: end the fit where a vetoed step moved something that can't be put back.
        allow_code: a rules file may name classes as `module:Class`: importing them runs their code.
        on_incident: told of incidents in a thread of its own: a callable (each one, when it opens and when it is over),
            an http(s) address that takes a POST of JSON, or `"module:function"`.
        live: in a notebook, a cell that shows the run while it trains: True, or seconds between two drawings.
        verbose: print incidents and the summary.

    Raises:
        ConfigError: a setting that can't be, with the nearest valid names.
    """

    _may_step_back = False

    def __init__(  # noqa: PLR0913 - a door: flat names, resolved at once
        self,
        rules: Any = "default",
        *,
        treatments: Any = None,
        surgery: Any = None,
        statistics: Any = (),
        paths: str | Sequence[str] = "*",
        every: int = 1,
        activations_every: int | None = 50,
        updates_every: int | None = 50,
        histograms_every: int | None = 100,
        log_every: int | None = None,
        backward: str = "tensor",
        memory_limit_mb: float = 256,
        on_error: str = "warn",
        run_dir: RunDir = None,
        sinks: Any = None,
        name: str = "gradwatch",
        histogram_scale: str = "log10",
        autopsy: bool = False,
        noise_scale: bool = False,
        what_if: bool = False,
        recompute_every: int | None = None,
        replicas_every: int | None = 100,
        fingerprints: bool = False,
        preflight: bool = False,
        conflicts_every: int | None = None,
        history: int = 1000,
        local_norms: bool = False,
        save_batch: bool = False,
        stop_on_unproven: bool = False,
        kind: str = "auto",
        allow_code: bool = False,
        on_incident: Callable[[Incident], Any] | str | None = None,
        live: bool | float = False,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        looks: dict[str, Any] = {"autopsy": autopsy, "noise_scale": noise_scale, "local_norms": local_norms}
        looks |= {"save_batch": save_batch, "histogram_scale": histogram_scale, "what_if": what_if}
        looks |= {"fingerprints": fingerprints, "kind": kind, "live": live, "paths": paths, "backward": backward}
        bounds: dict[str, Any] = {"memory_limit_mb": memory_limit_mb, "on_error": on_error, "allow_code": allow_code}
        cadences: dict[str, Any] = {"every": every, "log_every": log_every, "conflicts_every": conflicts_every}
        cadences |= {"activations_every": activations_every, "updates_every": updates_every}
        cadences |= {"recompute_every": recompute_every, "replicas_every": replicas_every}
        cadences |= {"histograms_every": histograms_every, "history": history}
        self.settings = resolve(
            rules=rules,
            treatments=treatments,
            surgery=surgery,
            statistics=statistics,
            sinks=sinks,
            name=name,
            stop_on_unproven=stop_on_unproven,
            **looks,
            **bounds,
            **cadences,
        )
        self._begin(checked_run_dir(run_dir), incident_target(on_incident), preflight, verbose)

    def _begin(self, run_dir: RunDir, on_incident: IncidentTarget | None, preflight: bool, verbose: bool) -> None:
        """Set up what is known before a fit."""
        self._run_dir, self._on_incident = run_dir, on_incident
        self._preflight, self._verbose = preflight, verbose
        self.preflight_report: PreflightReport | None = None
        self._session: Session | None = None
        self._elsewhere = Elsewhere()
        self._state: Mapping[str, Any] | None = None
        self._losses: list[Tensor] = []
        self._num_samples = 0
        self._batch: Any = None
        self._batch_idx = -1
        self._num_raw_steps = 0
        self._scalars: dict[str, float] = {}
        self._scale = ScaleReader()
        self._requests: list[Request] = []
        self._bar = NumberInBar(f"{self.settings.name}/norm", self._latest_norm)
        self._own_name = self.settings.name
        self._stage: str | None = None

    @property
    def state_key(self) -> str:
        return f"gradwatch:{self._own_name}"

    @property
    def _live(self) -> Session | None:
        # After a fit, what calls the loops by hand calls the hooks as well.
        return None if self._session is None or self._session.closed else self._session

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        ours = [c for c in trainer.callbacks if isinstance(c, GradWatch)]
        if sum(c is self for c in ours) > 1:
            # Listed twice it would measure, and treat, every step twice.
            trainer.callbacks = list({id(c): c for c in trainer.callbacks}.values())
        self._stage = stage
        named = own_names((id(c), c.settings.name) for c in ours if not c._may_step_back)
        self._own_name = named.get(id(self), self.settings.name)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        carried: Mapping[str, Any] | None = self._state
        if self._session is not None:
            if carried is None and trainer.global_step > 0:
                carried = self._session.state_dict()
            self._session.close()
        self._session = lightning_run.open_session(
            trainer,
            pl_module,
            replace(self.settings, name=self._own_name),
            run_dir=lightning_run.choose_run_dir(trainer, self._run_dir, self._own_name, fresh=carried is None),
            say=lambda line: self._say(trainer, line),
            on_incident=self._on_incident,
        )
        lightning_run.say_what_goes_back(self._session, trainer, pl_module)
        if self._session.what_ifs is not None:
            lightning_run.say_how_it_learns(self._session.what_ifs, trainer, pl_module)
        self._session.register(self._registered)
        if carried is not None:
            self._take_up(self._session, carried)
        self._state = None
        for package in ("lightning", "pytorch_lightning"):
            when_left("_call_and_handle_interrupt", package, self._left)
        if trainer.is_global_zero:
            self._elsewhere.tell(self._session.run_dir)
        self._session.begin(pl_module)
        lightning_run.hear_raw_steps(
            self._session, trainer, self, lambda o: self._measure(trainer, pl_module, o), self._settled
        )
        self._bar.attach(trainer.progress_bar_callback)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._live is not None:
            self._live.cases.take_loader(trainer.train_dataloader)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        session = self._live
        if session is not None:
            if self._preflight and trainer.global_step == 0 and self.preflight_report is None:
                self.preflight_report = lightning_run.checked(session, pl_module, batch)
            self._batch, self._batch_idx = batch, batch_idx
            session.see(batch)
            self._scale.begin(lightning_run.loss_scaler(trainer))
            session.before_forward(self._step(trainer))
            if session.engine.remembers() and pl_module.automatic_optimization:
                precision = trainer.precision_plugin
                session.engine.remember(
                    lambda: run_quietly(pl_module, batch, batch_idx, precision.train_step_context()),
                    session.count_samples(batch),
                )

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        session = self._live
        if session is None:
            return
        parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        scaler = lightning_run.loss_scaler(trainer)
        # Divided for accumulation already, and multiplied by the scaler.
        scale = self._scale.read(scaler)
        self._losses.append(loss.detach() * (parts / scale) if parts != scale else loss.detach())
        self._num_samples += session.count_samples(self._batch)
        session.before_backward(loss, scale=scale, parts=parts)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        session = self._live
        if session is None or session.tasks is None:
            return
        parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        session.after_backward(
            last=parts == 1 or not trainer.fit_loop._should_accumulate(),
            scale=self._scale.read(lightning_run.loss_scaler(trainer)),
            parts=parts,
            batch_size=session.count_samples(self._batch),
        )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._live is not None and not lightning_run.is_accumulating(trainer):
            self._measure(trainer, pl_module, optimizer)

    def _step(self, trainer: Any) -> int:
        """Return the steps taken so far: the Trainer does not count those of raw optimizers."""
        return int(trainer.global_step) + self._num_raw_steps

    def _measure(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        session = self._session
        assert session is not None
        raw = lightning_run.raw_optimizer(optimizer)
        several = len(trainer.optimizers) > 1
        inputs = StepInputs(
            step=self._step(trainer),
            batch_idx=self._batch_idx,
            losses=self._losses,
            batch=self._batch,
            num_samples=self._num_samples,
            optimizer=session.optimizer_number(raw) if several else None,
            scalars=self._scalars,
            # In manual optimization `loss.backward()` may be called, of which no event tells.
            has_backward=bool(self._losses) if pl_module.automatic_optimization else None,
        )
        lightning_run.note_trainer(inputs, trainer, optimizer, self._scale)
        self._scalars = {}
        if pl_module.automatic_optimization:
            # A closure called again (LBFGS) brings its own losses.
            self._losses, self._num_samples = [], 0
        outcome: StepOutcome = session.step(inputs, [raw] if several else None)
        self._requests += outcome.requests

    def _settled(self, trainer: Any) -> None:
        if self._live is not None:
            self._num_raw_steps += 1
            self._live.after_step()
            self._live.before_forward(self._step(trainer))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        session = self._live
        if session is None:
            return
        if not pl_module.automatic_optimization:
            self._losses, self._num_samples = [], 0
        self._batch = None
        session.after_step()
        requests, self._requests = self._requests + session.take_requests(), []
        self._carry_out(session, trainer, requests)

    def _carry_out(self, session: Session, trainer: Any, requests: Sequence[Request]) -> None:
        home = lightning_run.home_of(session, trainer, say=lambda line: self._say(trainer, line))
        for request in requests:
            session.carry_out(request, home)

    def _latest_norm(self) -> float | None:
        return None if self._session is None else self._session.engine.completion.latest_norm

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._live is not None and not trainer.sanity_checking and batch_idx == dataloader_idx == 0:
            self._scalars |= validation_inputs(batch, self._live.engine.guard)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._live is not None and not trainer.sanity_checking:
            self._scalars |= lightning_run.validation_metrics(trainer, self._live.engine.guard)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        session = self._live
        if session is None:
            return
        session.finish(self._scalars)
        self._scalars = {}
        if self._verbose and trainer.is_global_zero and not trainer.fast_dev_run:
            say_ending(session, no_files="" if self._run_dir is False else "the Trainer has no log folder")
        self._carry_out(session, trainer, session.take_last_requests())

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        # On an exception or Ctrl-C this alone runs: no teardown.
        with suppress(Exception):
            self._end(why_ended(exception))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._end("")
        else:
            self._let_go()

    def _end(self, why: str) -> None:
        session = self._session
        insist(partial(end_all, self._let_go, *([] if session is None else [partial(session.close, why)])))

    def _let_go(self) -> None:
        self._bar.detach()
        self._batch, self._losses = None, []
        self._stage = None

    def _left(self) -> None:
        # Another callback's `on_exception` may have raised before ours was asked.
        self._end("crashed or interrupted")

    def state_dict(self) -> dict[str, Any]:
        if self._session is not None:
            return {**self._session.state_dict(), "num_raw_steps": self._num_raw_steps}
        return dict(self._state) if isinstance(self._state, Mapping) else {}

    def load_state_dict(self, state_dict: Any) -> None:
        # Comes before `on_train_start` for one device and DDP, and for FSDP too; never reset there.
        if self._live is not None:
            self._take_up(self._live, state_dict)
        elif self._stage in (None, "fit"):  # not where a checkpoint is evaluated: a later fit does not go on from it
            # Saved before a fit there is none.
            self._state = None if state_dict == {} else state_dict

    def _take_up(self, session: Session, state: Any) -> None:
        if session.load_state_dict(state):
            told = state.get("num_raw_steps")
            self._num_raw_steps = told if isinstance(told, int) else self._num_raw_steps

    def _say(self, trainer: Any, line: str) -> None:
        if not self._verbose or not trainer.is_global_zero:
            return
        say_beside(trainer.progress_bar_callback, line)

    def __getstate__(self) -> dict[str, Any]:
        # Spawned processes get the callback as it was before the fit. What the Trainer puts here holds its module.
        kept = {k: v for k, v in self.__dict__.items() if k not in ("log", "log_dict")}
        return {**kept, "_session": None, "_losses": [], "_batch": None, "_scale": ScaleReader(), "_registered": {}}


# Lightning refuses two callbacks of one key before it calls `setup`, where each of ours gets a key of its own. What
# wraps its own method passes for a callback without state there, and saves and loads as any other.
update_wrapper(GradWatch.state_dict, _Callback.state_dict, assigned=(), updated=())
