"""Sinks for the loggers that a trainer already has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .._warn import one_line, warn
from ..protocols import Sink
from ._duck import DuckSink, is_logger
from ._mlflow import MlflowSink
from ._trackio import TrackioSink, is_trackio
from ._wandb import WandbSink

__all__ = ["sinks_for_loggers"]


def sinks_for_loggers(loggers: Iterable[Any], *, name: str = "gradwatch", **tensorboard: Any) -> list[Sink]:
    """Return a sink for each logger that gradwatch can write to, chosen by the logger's class name.

    Known are Lightning's loggers (no Lightning is imported), a `SummaryWriter`, a run of wandb, of Aim or of Trackio
    (or its module), and whatever has one of the methods of `DuckSink`. A logger that is none of these, or that fails,
    gives one warning and is passed over.

    Args:
        loggers: such as `trainer.loggers`. Call it on the rank that writes.
        name: tags and keys begin with it.
        **tensorboard: settings of `TensorBoardSink`.
    """
    sinks = []
    for logger in loggers:
        try:
            sink = _sink(logger, name, tensorboard)
        except Exception as error:
            _say(f"{type(logger).__name__} can't be written to: {one_line(error)}")
            continue
        if sink is None:
            _say(f"{type(logger).__name__} is no logger that gradwatch knows; see `DuckSink` for what it needs.")
        else:
            sinks.append(sink)
    return sinks


def _sink(logger: Any, name: str, tensorboard: dict[str, Any]) -> Sink | None:
    for ancestor in type(logger).__mro__:
        if ancestor.__name__ in _MAKERS:
            return _MAKERS[ancestor.__name__](logger, name, tensorboard)
        if ancestor.__name__ == "Run" and ancestor.__module__.startswith("wandb."):
            return WandbSink(logger, name=name)
    if is_trackio(logger):
        return TrackioSink(logger, name=name)
    return DuckSink(logger, name=name) if is_logger(logger) else None


def _tensorboard(writer: Any, name: str, settings: dict[str, Any]) -> Sink:
    from .tensorboard import TensorBoardSink

    return TensorBoardSink(writer, name=name, **settings)


_MAKERS: dict[str, Callable[[Any, str, dict[str, Any]], Sink]] = {
    "TensorBoardLogger": lambda logger, name, settings: _tensorboard(logger.experiment, name, settings),
    "SummaryWriter": _tensorboard,
    "WandbLogger": lambda logger, name, _: WandbSink(logger.experiment, name=name),
    "MLFlowLogger": lambda logger, name, _: MlflowSink(logger.experiment, logger.run_id, name=name),
    "CSVLogger": lambda logger, name, _: DuckSink(logger, name=name, fixed_keys=True),
}


def _say(what: str) -> None:
    warn(f"{what} The run goes on without it.", stacklevel=3)
