"""What an action may ask of the trainer: one class for each request. There are no others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, suggest
from .records import Incident

__all__ = [
    "GoBack",
    "LowerLearningRates",
    "Request",
    "SaveCheckpoint",
    "StopTraining",
    "SwitchSurgery",
    "TellSomeone",
    "checked_request",
]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What all requests have; only those below are made.

    Attributes:
        reason: the sentence to show.
    """

    reason: str = ""

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        if cls is Request:
            given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
            raise ConfigError(f"Request({given}) asks for nothing. {_what_there_is(str(settings.get('kind', '')))}")
        return super().__new__(cls)


@dataclass(frozen=True, kw_only=True)
class LowerLearningRates(Request):
    """Multiply the learning rates for some steps.

    Attributes:
        factor: above 0 and below 1.
        steps: optimizer steps; None: until the end.
        name: whose lowering it is: asked again under one name, the time begins anew.
    """

    factor: float
    steps: int | None = None
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class SaveCheckpoint(Request):
    """Write a checkpoint now.

    Attributes:
        filename: without the trainer's own ending.
    """

    filename: str = "gradwatch"


@dataclass(frozen=True, kw_only=True)
class StopTraining(Request):
    """End the training after this step.

    Attributes:
        as_error: it must not end as a success.
    """

    as_error: bool = False


@dataclass(frozen=True, kw_only=True)
class TellSomeone(Request):
    """Call someone with an incident.

    Attributes:
        target: called with it.
        incident: as it stands.
    """

    target: Callable[[Incident], object]
    incident: Incident


@dataclass(frozen=True, kw_only=True)
class SwitchSurgery(Request):
    """Do this surgery between task gradients from the next micro-batch on.

    Attributes:
        surgery: a `gradwatch.treatments.Surgery`.
    """

    surgery: Any


@dataclass(frozen=True, kw_only=True)
class GoBack(Request):
    """Make the training what it was before a trouble began, and go on from there with the data that come next.

    Attributes:
        name: of the rule that asks; its budget is kept under it.
        step: at which it fired.
        began: the first step at which the rule held.
        steps: to go back from there, at least, where a snapshot reaches so far.
        max_times: after which the training is stopped.
        schedules: learning rates go back too.
        randomness: random states go back too.
        then: asked of the trainer as well, once it has gone back.
    """

    name: str
    step: int
    began: int
    steps: int
    max_times: int
    schedules: bool = False
    randomness: bool = False
    then: tuple[Request, ...] = ()


KNOWN: tuple[type[Request], ...] = (
    GoBack,
    LowerLearningRates,
    SaveCheckpoint,
    StopTraining,
    SwitchSurgery,
    TellSomeone,
)


def checked_request(request: object) -> Request:
    """Return the request, if it is one that trainers are asked.

    Raises:
        ConfigError: it is not, with the ones there are.
    """
    if isinstance(request, KNOWN):
        return request
    raise ConfigError(f"nobody carries out a request of type {type(request).__name__}. {_what_there_is('')}")


def _what_there_is(kind: str) -> str:
    names = [cls.__name__ for cls in KNOWN]
    return f"{suggest(kind, names)} Ask for one of gradwatch.requests: {', '.join(names)}.".lstrip()
