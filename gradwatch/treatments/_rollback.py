"""Going back: the training of some hundred steps ago, with the data that come next."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..errors import ConfigError
from ..protocols import Action, Context, as_action_or_treatment
from ..records import Incident
from ..requests import GoBack, Request, checked_request
from ._actions import BaseAction
from ._checks import check_choice, check_count, check_number

__all__ = ["Rollback"]

_WAYS = ("keep", "return")


@dataclass(frozen=True, eq=False)
class Rollback(BaseAction):
    """Take the training back to before the trouble began, and go on with other data.

    Parameters, buffers, the optimizers' memory, the loss scaler and averaged models become, bit for bit, what they were
    at a snapshot from before the first step at which the rule held: the youngest that lies at least `steps` before
    that, else the oldest there is. One whose weights are not finite is never taken. The data loader goes on, so that
    the batches of the bad stretch are not seen again; the step count goes on, too. What rules remember goes back with
    the weights, as it belongs to them; what treatments remember stays.

    The step that it is asked for in is not taken, and the snapshot is put back before the next forward pass. Where
    numbers come late, from a device, it comes some steps later. All ranks go back, to the same snapshot, or none.

    Source: A. Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, arXiv 2204.02311, section 5.1:
    spikes went away with a restart from about 100 steps before and 200 to 500 batches left out.

    Args:
        steps: to go back at least, before the trouble began, where a snapshot reaches so far.
        snapshots: that are held. With two, what is gone back lies between `steps` and about twice as many; with five,
            between `steps` and about 1.25 times as many. With one, it may be next to nothing.
        max_times: how often; after that a stop is asked for.
        then: actions besides, once it has gone back: `LowerLearningRate(0.5, steps=500)`, ...
        every: steps from one snapshot to the next; None: so many that `snapshots` of them reach back so far, from
            where the rule can tell.
        schedulers: `"keep"`: learning rates go on as scheduled; `"return"`: they are those of the snapshot.
        random_state: `"keep"`: it goes on, so that batches that are drawn with it are others; `"return"`.
        storage: `"host"`: snapshots lie in the host's memory, pinned where there is a device, each rank's its own;
            `"disk"`: in files, written beside the training.
        folder: for the files; None: a temporary one. What was written there is removed when the run ends.
        memory_limit_mb: for what the host holds. What would not fit is refused when training begins.
    """

    steps: int = 100
    snapshots: int = 2
    max_times: int = 3
    then: Any = ()
    every: int | None = field(default=None, kw_only=True)
    schedulers: str = field(default="keep", kw_only=True)
    random_state: str = field(default="keep", kw_only=True)
    storage: str = field(default="host", kw_only=True)
    folder: str | Path | None = field(default=None, kw_only=True)
    memory_limit_mb: float = field(default=4096, kw_only=True)

    keeps_own_budget: ClassVar[bool] = True
    wants_beginning: ClassVar[bool] = True
    holds_actions: ClassVar[tuple[str, ...]] = ("then",)

    def __post_init__(self) -> None:
        check_count(self, "steps", self.steps, at_least=1)
        check_count(self, "snapshots", self.snapshots, at_least=1)
        check_count(self, "max_times", self.max_times, at_least=1)
        check_count(self, "every", self.every, at_least=1, optional=True)
        for name, known in (("schedulers", _WAYS), ("random_state", _WAYS), ("storage", ("host", "disk"))):
            check_choice(self, name, getattr(self, name), known)
        check_number(self, "memory_limit_mb", self.memory_limit_mb, above=0)
        if self.folder is not None and not isinstance(self.folder, (str, Path)):
            raise ConfigError(f"Rollback: `folder` must be a path, or None. Got {self.folder!r}.")
        object.__setattr__(self, "then", _actions(self.then))

    def act(self, incident: Incident, context: Context) -> None:
        asked = _Asked(context)
        for action in self.then:
            action.act(incident, asked)
        context.request(
            GoBack(
                reason=f"going back at least {self.steps} steps: {incident}",
                name=incident.name or incident.rule,
                step=context.step,
                began=int(incident.details.get("began", incident.first_step)),
                steps=self.steps,
                max_times=self.max_times,
                schedules=self.schedulers == "return",
                randomness=self.random_state == "return",
                then=tuple(asked.requests),
            )
        )


class _Asked:
    """The context of an action whose requests wait until it has gone back."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.requests: list[Request] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def request(self, request: Request) -> None:
        self.requests.append(checked_request(request))


def _actions(given: Any) -> tuple[Action, ...]:
    what = "Rollback: `then` takes actions such as LowerLearningRate(0.5)"
    items = [as_action_or_treatment(item, what) for item in (given if isinstance(given, (list, tuple)) else (given,))]
    for item in items:
        if isinstance(item, Rollback) or not isinstance(item, Action):
            raise ConfigError(f"{what}. Got {item!r}.")
    return tuple(item for item in items if isinstance(item, Action))
