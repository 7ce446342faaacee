"""What a rule may ask of the trainer. Actions change no gradient: each leaves a request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, ClassVar

from .._text import file_name, shown
from ..errors import ConfigError
from ..protocols import Action, Context
from ..records import Incident
from ..requests import LowerLearningRates, SaveCheckpoint, StopTraining, TellSomeone
from ._checks import check_count, check_number
from ._notify import resolve_target

_FIELDS = [("step", "", None), ("rule", "", None), ("step", "06d", None)]

__all__ = ["BaseAction", "Checkpoint", "LowerLearningRate", "Notify", "Stop"]


class BaseAction(Action):
    """An action; those here are frozen dataclasses of settings."""


@dataclass(frozen=True, eq=False)
class LowerLearningRate(BaseAction):
    """Ask that the learning rates be multiplied by `factor` for some steps, whatever the schedule does meanwhile.

    Fired again, the time begins anew; the factor does not compound.

    Args:
        factor: above 0 and below 1.
        steps: optimizer steps; None: until the end.
    """

    factor: float = 0.5
    steps: int | None = 1000

    def __post_init__(self) -> None:
        check_number(self, "factor", self.factor, above=0, below=1)
        check_count(self, "steps", self.steps, at_least=1, optional=True)

    def act(self, incident: Incident, context: Context) -> None:
        length = "from here on" if self.steps is None else f"for {self.steps} steps"
        context.request(
            LowerLearningRates(
                reason=f"learning rate x {self.factor:g} {length}: {incident}",
                factor=self.factor,
                steps=self.steps,
                name=incident.name or incident.rule,
            )
        )


@dataclass(frozen=True, eq=False)
class Checkpoint(BaseAction):
    """Ask that a checkpoint be written now.

    Args:
        filename: with `{step}` and `{rule}` filled in; the trainer's own ending is added.
    """

    filename: str = "gradwatch-{rule}-{step}"

    def __post_init__(self) -> None:
        try:
            fields = [part[1:] for part in Formatter().parse(self.filename) if part[1] is not None]
            fine = len(self.filename) <= 200 and all(field in _FIELDS for field in fields)
        except (TypeError, ValueError):
            fine = False
        if not fine:
            raise ConfigError(
                f"Checkpoint: `filename` must be text with no other fields than {{step}} and {{rule}}. "
                f"Got {shown(self.filename)}."
            )
        parts = self.filename.replace("\\", "/").split("/")
        if ".." in parts or not parts[0] or ":" in self.filename or "\0" in self.filename:
            raise ConfigError(f"Checkpoint: `filename` leads elsewhere. Got {shown(self.filename)}.")

    def act(self, incident: Incident, context: Context) -> None:
        # A rule may be called anything; what it fills in stays one part of a path.
        name = self.filename.format(step=context.step, rule=file_name(incident.name or incident.rule))
        context.request(SaveCheckpoint(reason=f"checkpoint: {incident}", filename=name))


@dataclass(frozen=True, eq=False)
class Stop(BaseAction):
    """Ask that the training end after this step.

    Args:
        reason: to show instead of the incident's own words.
    """

    reason: str = ""

    def act(self, incident: Incident, context: Context) -> None:
        context.request(StopTraining(reason=self.reason or f"stop: {incident}"))


@dataclass(frozen=True, eq=False)
class Notify(BaseAction):
    """Tell someone: a function of the incident, or an address that is sent the incident as JSON.

    Args:
        target: callable(incident); an http(s) address; or `"module:function"`.
    """

    names_code: ClassVar[tuple[str, ...]] = ("target",)
    """Settings that may name a function to import: a rules file is asked whether it may."""

    target: str | Callable[[Incident], Any]
    _call: Callable[[Incident], Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_call", resolve_target(self.target))

    def act(self, incident: Incident, context: Context) -> None:
        context.request(TellSomeone(reason=str(incident), target=self._call, incident=incident))
