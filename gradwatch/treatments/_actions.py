"""What a rule may ask of the trainer. Actions change no gradient: each leaves a request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from ..protocols import Context, Request
from ..records import Incident
from ._base import BaseTreatment
from ._checks import check_count, check_number
from ._notify import resolve_target

__all__ = ["BaseAction", "Checkpoint", "LowerLearningRate", "Notify", "Stop"]


class BaseAction:
    """An action's name; subclasses are frozen dataclasses of settings."""

    name = BaseTreatment.name

    def act(self, incident: Incident, context: Context) -> None:
        """Leave `context.request(Request(...))`."""
        raise NotImplementedError


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
            Request(
                kind="lower_learning_rate",
                reason=f"learning rate x {self.factor:g} {length}: {incident}",
                values={"factor": self.factor, "steps": self.steps, "rule": incident.name or incident.rule},
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
            self.filename.format(step=0, rule="rule")
        except (AttributeError, KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"Checkpoint: `filename` must be text with no other fields than {{step}} and {{rule}}. "
                f"Got {self.filename!r}."
            ) from error

    def act(self, incident: Incident, context: Context) -> None:
        name = self.filename.format(step=context.step, rule=incident.name or incident.rule)
        context.request(Request(kind="checkpoint", reason=f"checkpoint: {incident}", values={"filename": name}))


@dataclass(frozen=True, eq=False)
class Stop(BaseAction):
    """Ask that the training end after this step.

    Args:
        reason: to show instead of the incident's own words.
    """

    reason: str = ""

    def act(self, incident: Incident, context: Context) -> None:
        context.request(Request(kind="stop", reason=self.reason or f"stop: {incident}"))


@dataclass(frozen=True, eq=False)
class Notify(BaseAction):
    """Tell someone: a function of the incident, or an address that is sent the incident as JSON.

    Args:
        target: callable(incident); an http(s) address; or `"module:function"`.
    """

    target: str | Callable[[Incident], Any]
    _call: Callable[[Incident], Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_call", resolve_target(self.target))

    def act(self, incident: Incident, context: Context) -> None:
        context.request(
            Request(kind="notify", reason=str(incident), values={"target": self._call, "incident": incident})
        )
