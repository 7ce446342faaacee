"""Where the requests of actions are carried out: each in one place, whatever the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .._warn import one_line
from ..errors import ConfigError
from ..requests import (
    GoBack,
    LowerLearningRates,
    Request,
    SaveCheckpoint,
    StopTraining,
    SwitchSurgery,
    TellSomeone,
    checked_request,
)
from ._engine import Engine
from ._judge import own_incident
from ._tasks import Tasks
from ._telling import Telling

__all__ = ["Home", "carry_out", "makes_sense_at_the_end"]


@dataclass(frozen=True)
class Home:
    """What only a trainer can do for a request.

    Attributes:
        stop: ends the training; may raise.
        save_checkpoint: writes one under a name; None: nobody can, which is said where one is asked for.
        no_checkpoint: what to do about that.
    """

    stop: Callable[[StopTraining], object]
    save_checkpoint: Callable[[str], object] | None = None
    no_checkpoint: str = ""


def carry_out(request: Request, home: Home, *, engine: Engine, tasks: Tasks | None, telling: Telling) -> None:
    """Do what an action asks for. What can't be done is an incident, and one warning.

    Raises:
        TrainingStopped: it is a stop, and the trainer has no other way to be stopped.
        ConfigError: nobody can do it, with `on_error="raise"`.
    """
    if isinstance(request, StopTraining):
        home.stop(request)
        return
    try:
        _do(request, home, engine, tasks, telling)
    except Exception as error:
        what = f"a request of type {type(request).__name__} was not carried out"
        engine.judge.report(own_incident("request_failed", engine.step, f"{what}: {one_line(error)}", is_harm=False))
        engine.guard.stumble(what, error)


def _do(request: Request, home: Home, engine: Engine, tasks: Tasks | None, telling: Telling) -> None:
    match request:
        case LowerLearningRates():
            engine.rates.lower(request.factor, request.steps, name=request.name)
        case SaveCheckpoint():
            if home.save_checkpoint is None:
                raise ConfigError(f"nothing here writes checkpoints. {home.no_checkpoint}".rstrip())
            home.save_checkpoint(request.filename)
        case SwitchSurgery():
            if tasks is None:
                raise ConfigError("no task gradients are seen in this training.")
            tasks.switch(request.surgery)
        case GoBack():
            raise ConfigError("no snapshots are taken here: a `Rollback` behind a rule has them taken.")
        case TellSomeone():
            telling.tell(request.target, request.incident)
        case _:
            checked_request(request)
            raise NotImplementedError(f"nobody here carries out {type(request).__name__}")


def makes_sense_at_the_end(request: Request) -> bool:
    """Return whether it is worth doing once there is no step any more."""
    return not isinstance(request, (GoBack, LowerLearningRates, SwitchSurgery))
