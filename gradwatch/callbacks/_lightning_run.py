"""What gradwatch takes from a Lightning Trainer (sinks, a folder, metrics, a scaler), and what it asks of it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from .._preflight import PreflightReport, check_lightning
from ..errors import TrainingStopped
from ..requests import StopTraining
from ..sinks import sinks_for_loggers
from ..torchside import engine_of, is_flat_sharded
from ..watch import (
    Guard,
    Home,
    IncidentTarget,
    RunDir,
    ScaleReader,
    Session,
    Settings,
    StepInputs,
    WhatIfs,
    describe_engine,
    raw_optimizer,
    run_dir_of,
    scale_left_in_gradients,
    validation_scalars,
)
from ._quiet import run_quietly

__all__ = [
    "checked",
    "choose_run_dir",
    "hear_raw_steps",
    "home_of",
    "is_accumulating",
    "loss_scaler",
    "note_trainer",
    "open_session",
    "raw_optimizer",
    "say_how_it_learns",
    "say_what_goes_back",
    "validation_metrics",
]


def open_session(
    trainer: Any,
    pl_module: Any,
    settings: Settings,
    *,
    run_dir: Path | None,
    say: Callable[[str], None],
    on_incident: IncidentTarget | None,
) -> Session:
    """Return the session of a fit that begins, with the Trainer's loggers as sinks where none were given."""
    sinks = settings.sinks
    if sinks is None:
        loggers = [] if trainer.fast_dev_run else trainer.loggers
        scale = settings.options.histogram_scale
        sinks = tuple(sinks_for_loggers(loggers, name=settings.name, histogram_scale=scale))
    session = Session(
        # What its flat parameters hold the wrapper of FSDP alone knows.
        trainer.model if is_flat_sharded(trainer.model) else pl_module,
        [raw_optimizer(o) for o in trainer.optimizers],
        settings,
        sinks=sinks,
        run_dir=run_dir,
        log_every=max(1, int(settings.log_every or trainer.log_every_n_steps)),
        say=say,
        on_incident=on_incident,
        start_step=trainer.global_step,
    )
    session.engine.gates.know(trainer.optimizers)
    return session


def choose_run_dir(trainer: Any, given: RunDir, name: str, *, fresh: bool) -> Path | None:
    """Return the folder for a run's files: the given one, else one in the log folder that no earlier run has.

    None where nothing is to be written: without a logger and without a `default_root_dir` of its own, the Trainer
    leaves the working directory as it is. A logger that has no folder (a remote one) has its files where the Trainer
    puts its checkpoints.
    """
    if trainer.fast_dev_run:
        return None
    log_dir = _log_dir(trainer)
    if log_dir is None:
        log_dir = _root(trainer)
    return run_dir_of(given, name, None if log_dir is None else Path(log_dir), fresh=fresh)


def _log_dir(trainer: Any) -> str | None:
    """Return the folder of the first logger, as this rank knows it.

    `Trainer.log_dir` waits for all ranks, and a callback may be on rank 0 alone.
    """
    if not trainer.loggers:
        return None
    logger = trainer.loggers[0]
    has_own = {"TensorBoardLogger", "CSVLogger"} & {base.__name__ for base in type(logger).__mro__}
    return cast("str | None", logger.log_dir if has_own else logger.save_dir)


def _root(trainer: Any) -> str | None:
    """Return the folder in which the Trainer keeps what goes to no logger; None where it keeps nothing, or was given
    none: the working directory stands for that."""
    root = str(trainer.default_root_dir)
    if trainer.loggers:
        writes = bool(trainer.checkpoint_callbacks)
    else:
        writes = not trainer.barebones and Path(root).resolve() != Path.cwd()
    return root if writes and "://" not in root else None


def validation_metrics(trainer: Any, guard: Guard) -> dict[str, float]:
    """Return `val_loss` and `val_<metric>` from what was logged while the Trainer validated."""
    return validation_scalars(trainer.callback_metrics, guard, known=_logged_in_validation(trainer))


def _logged_in_validation(trainer: Any) -> set[str] | None:
    # Private, but the only place that knows a `loss` of validation from one of training; else names must do.
    try:
        return {result.meta.name for result in trainer.fit_loop.epoch_loop.val_loop._results.values()}
    except Exception:
        return None


def loss_scaler(trainer: Any) -> Any:
    """Return the Trainer's loss scaler, or None where it has none that is at work."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def home_of(session: Session, trainer: Any, *, say: Callable[[str], None]) -> Home:
    """Return what the Trainer does for requests."""

    def stop(request: StopTraining) -> None:
        say(f"gradwatch {request.reason}")
        if request.as_error:
            raise TrainingStopped(request.reason)
        trainer.should_stop = True

    def save(filename: str) -> None:
        # Ranks save together, into one place: rank 0's, whose folder may have another number.
        folder = trainer.strategy.broadcast(str(session.run_dir or trainer.default_root_dir))
        trainer.save_checkpoint(Path(folder, f"{filename}.ckpt"))

    return Home(stop, save)


def hear_raw_steps(
    session: Session,
    trainer: Any,
    callback: Any,
    measure: Callable[[Optimizer], None],
    settled: Callable[[Any], None],
) -> None:
    """Let steps of raw optimizers be measured: in manual optimization no event tells of them.

    Not those of a fit inside the fit, which has callbacks of its own (a search for a learning rate).

    Args:
        session: of the fit.
        trainer: of the fit.
        callback: measures while it is among the Trainer's callbacks.
        measure: called with an optimizer before it steps.
        settled: called with the Trainer when it has stepped.
    """

    def when_called(call: Callable[[Any], None], value: Any) -> None:
        if any(each is callback for each in trainer.callbacks):
            call(value)

    announced = session.engine.announced
    announced.measure = lambda optimizer: when_called(measure, optimizer)
    announced.settled = lambda optimizer: when_called(settled, trainer)


def note_trainer(inputs: StepInputs, trainer: Any, optimizer: Optimizer, reader: ScaleReader) -> None:
    """Put on a step's inputs what the Trainer does to its gradients: the epoch, its loss scaler, its own clip."""
    inputs.epoch, scaler = trainer.current_epoch, loss_scaler(trainer)
    if (engine := engine_of(trainer.model)) is not None:
        describe_engine(engine, inputs)
        return
    if scaler is not None:
        inputs.scaler, inputs.scale = True, reader.read(scaler)
        inputs.grad_scale = scale_left_in_gradients(scaler, optimizer)
        inputs.scale_left = partial(scale_left_in_gradients, scaler)
    module = trainer.lightning_module
    if not module.automatic_optimization:
        return
    if type(module).configure_gradient_clipping not in _own_clips():
        inputs.clipper = f"{type(module).__name__}.configure_gradient_clipping"
    elif trainer.gradient_clip_val:
        how = str(getattr(trainer.gradient_clip_algorithm, "value", None) or "norm")
        inputs.clipper = f"Lightning's gradient_clip_val={trainer.gradient_clip_val:g} (by {how})"
        if how == "norm":
            inputs.scalars["trainer_clip"] = float(trainer.gradient_clip_val)


def _own_clips() -> list[Any]:
    """Return Lightning's own `configure_gradient_clipping`, of both packages: what is none of these is the user's."""
    packages = ("lightning.pytorch", "pytorch_lightning")
    modules = [getattr(sys.modules.get(name), "LightningModule", None) for name in packages]
    return [m.configure_gradient_clipping for m in modules if m is not None]


def checked(session: Session, pl_module: Any, batch: Any) -> PreflightReport | None:
    """Return the pre-flight's report, with its incidents told, or None where it failed."""
    with session.engine.guard("the pre-flight"):
        report = check_lightning(pl_module, batch)
        for incident in report.incidents():
            session.engine.judge.report(incident)
        return report
    return None


def is_accumulating(trainer: Any) -> bool:
    """Return whether DeepSpeed's engine, which is stepped after every micro-batch, will only add up gradients now."""
    engine = engine_of(trainer.model)
    return engine is not None and not engine.is_gradient_accumulation_boundary()


def say_what_goes_back(session: Session, trainer: Any, pl_module: Any) -> None:
    """Say what a Trainer has besides the module and its optimizers, that belongs to a snapshot of the training."""
    session.restores(
        scaler=loss_scaler(trainer),
        also=lambda: _averages(trainer, pl_module),
        schedulers=lambda: [config.scheduler for config in trainer.lr_scheduler_configs],
    )


def say_how_it_learns(what_ifs: WhatIfs, trainer: Any, pl_module: Any) -> None:
    """Say how a Lightning module makes its loss, for those who try the training again."""
    if not pl_module.automatic_optimization:
        what_ifs.why_not = "in manual optimization the module steps by itself"
    reference = weakref.ref(trainer)

    def loss_fn(model: Any, batch: Any) -> Any:
        alive = reference()
        assert alive is not None
        return run_quietly(model, batch, 0, alive.precision_plugin.train_step_context())

    what_ifs.loss_fn = loss_fn


def _averages(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """Return averaged models that callbacks keep, whoever wrote these: modules with parameters that are not the
    trained one's, dicts of its names, and the counts beside them."""
    own = {id(each) for each in (*pl_module.modules(), trainer.model)}
    names = {name for name, _ in pl_module.named_parameters()}
    found: dict[str, Any] = {}
    for number, callback in enumerate(trainer.callbacks):
        held = vars(callback) if hasattr(callback, "__dict__") else {}
        kept = {name: value for name, value in held.items() if _is_average(value, own, names)}
        if kept:
            kept |= {name: value for name, value in held.items() if isinstance(value, Tensor)}
        found |= {f"{type(callback).__name__} {number}, {name}": value for name, value in kept.items()}
    return found


def _is_average(value: Any, own: set[int], names: set[str]) -> bool:
    if isinstance(value, nn.Module):
        return id(value) not in own and any(True for _ in value.parameters())
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(tensor, Tensor) for tensor in value.values()) and names <= value.keys()
