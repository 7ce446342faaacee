"""What the user asks of surgery."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ...errors import ConfigError
from ...protocols import Action, Context
from ...records import Incident
from ...requests import SwitchSurgery
from ._weights import resolve_method

if TYPE_CHECKING:
    from ._controller import SurgeryController

__all__ = ["Surgery"]

_GRAMIANS = ("params", "last", "features")
_COMBINE = ("backward", "direct")
_HEADS = ("weighted", "plain")


class Surgery(Action):
    """Settings of gradient surgery between the tasks of one batch.

    The tasks' gradients with respect to shared parameters give a k x k Gramian, a method turns it into k weights, and
    one ordinary backward runs in which each task's loss counts with its weight.

    Args:
        method: a name in `gradwatch.treatments.surgery.METHODS`, or a callable from a Gramian to weights.
        shared: "auto" finds the parameters that at least two losses depend on, once for each set of task names; else a
            glob over parameter paths (`*` crosses dots; a module's path stands for all its parameters), or several.
            Losses that are entries of one tensor all depend on the same parameters: name the shared ones.
        gramian: with respect to what the Gramian is taken. "params": all shared parameters. "last": those of the
            module that owns the shared parameter used last in the forward pass. "features": the tensors nearest the
            losses that all tasks share. The last two are cheap, since no probe passes through the shared part, and
            approximate.
        when: "always"; "conflict": only where two tasks' gradients point apart; or a number n: at every n-th optimizer
            step, the plain sum at the others.
        keep_length: give the combined gradient the length of the plain sum, so that the learning rate keeps its
            meaning. Methods differ: PCGrad returns a sum, UPGrad a mean, Nash-MTL a fixed length.
        combine: "backward": one ordinary backward follows k probes. "direct": the probes' gradients are combined
            instead (one backward less; gradient hooks of modules see the probes only).
        heads: "weighted": a task's own parameters train with the task's weight too, as if its loss had been multiplied.
            "plain": they train as without surgery; the weight is applied where the task's gradient enters what tasks
            share (in the graph; costs a walk over it at each step).
        **options: of the method, such as `c` of cagrad.

    As the `then` of a rule it is an action: it asks the engine to switch surgery on.

    Raises:
        UnknownNameError: no such method or option of it.
        ConfigError: another setting can't be.
    """

    name = "surgery"

    def __init__(
        self,
        method: str | Callable[..., Any] = "pcgrad",
        *,
        shared: str | Sequence[str] = "auto",
        gramian: str = "params",
        when: str | int = "always",
        keep_length: bool = True,
        combine: str = "backward",
        heads: str = "weighted",
        **options: Any,
    ) -> None:
        resolve_method(method, options)
        if gramian not in _GRAMIANS:
            raise ConfigError(f"`gramian` must be one of {', '.join(_GRAMIANS)}. Got {gramian!r}.")
        if combine not in _COMBINE:
            raise ConfigError(f"`combine` must be one of {', '.join(_COMBINE)}. Got {combine!r}.")
        if heads not in _HEADS:
            raise ConfigError(f"`heads` must be one of {', '.join(_HEADS)}. Got {heads!r}.")
        number = isinstance(when, int) and not isinstance(when, bool) and when >= 1
        if when not in ("always", "conflict") and not number:
            raise ConfigError(f"`when` must be 'always', 'conflict' or a number of steps >= 1. Got {when!r}.")
        if gramian == "features" and shared != "auto":
            raise ConfigError(
                "gramian='features' finds the tensors that all tasks share in the graph: leave shared='auto'. "
                f"Got shared={shared!r}."
            )
        if combine == "direct" and gramian != "params":
            raise ConfigError(f"combine='direct' needs the probes of gramian='params'. Got gramian={gramian!r}.")
        self.method = method
        self.shared = shared
        self.gramian = gramian
        self.when = when
        self.keep_length = keep_length
        self.combine = combine
        self.heads = heads
        self.options = options

    def acts_at(self, step: int) -> bool:
        """Return whether surgery is due at this optimizer step."""
        return not isinstance(self.when, int) or step % self.when == 0

    def act(self, incident: Incident, context: Context) -> None:
        """Ask the engine to switch this surgery on."""
        context.request(SwitchSurgery(reason=incident.rule, surgery=self))

    def controller(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> SurgeryController:
        """Return what does this surgery during one run, for the (path, parameter) pairs of a model."""
        from ._controller import SurgeryController

        return SurgeryController(self, parameters)

    def __repr__(self) -> str:
        return f"Surgery({self.method!r}, when={self.when!r}, gramian={self.gramian!r}, keep_length={self.keep_length})"
