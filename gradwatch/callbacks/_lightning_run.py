"""What a Lightning run gives gradwatch at its beginning and at validation: sinks, folder, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..sinks import sinks_for_loggers
from ..watch import IncidentTarget, Session, Settings
from ._run_dir import free_run_dir

__all__ = ["choose_run_dir", "open_session", "validation_scalars"]


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
    return Session(
        pl_module,
        [getattr(o, "_optimizer", o) for o in trainer.optimizers],
        settings,
        sinks=sinks,
        run_dir=run_dir,
        log_every=max(1, int(settings.log_every or trainer.log_every_n_steps)),
        say=say,
        on_incident=on_incident,
        start_step=trainer.global_step,
    )


def choose_run_dir(trainer: Any, given: str | Path | bool | None, name: str, *, fresh: bool) -> Path | None:
    """Return the folder for a run's files: the given one, else one in the log folder that no earlier run has."""
    # `log_dir` is a collective: every rank asks.
    log_dir = trainer.log_dir or trainer.default_root_dir
    if given is False or trainer.fast_dev_run:
        return None
    if isinstance(given, (str, Path)):
        return Path(given)
    folder = Path(log_dir) / name
    return free_run_dir(folder) if fresh else folder


def validation_scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return `val_loss` and `val_<metric>` from the Trainer's metrics (`val/loss`, `valid_acc`, ...)."""
    found = {}
    for key, value in metrics.items():
        word = key.replace("/", "_")
        if word.startswith("val"):
            word = word.removeprefix("validation").removeprefix("valid").removeprefix("val").lstrip("_")
            found[f"val_{word or 'value'}"] = float(value)
    return found
