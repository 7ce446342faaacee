"""What the floors above agree on: rules, treatments, actions and sinks, each a small protocol.

Rules never import treatments: a rule's `then` holds anything that satisfies `Treatment` or `Action`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from .records import Finding, Incident, StepRecord

__all__ = ["Action", "Context", "Request", "Rule", "RunMeta", "Sink", "Treatment"]


@runtime_checkable
class Rule(Protocol):
    """Reads records, reports findings. Holds settings only; its memory is passed through.

    `rule_name` is the class name in snake case; `name` what the user calls it (else the same).
    """

    name: str
    severity: str
    then: Sequence[Any]

    @property
    def rule_name(self) -> str: ...

    def init(self) -> Any:
        """Return the memory before the first record: plain values and numpy arrays only."""
        ...

    def judge(self, record: StepRecord, state: Any) -> tuple[Sequence[Finding], Any]:
        """Return what this record shows, and the memory to pass with the next one. Pure."""
        ...

    def limit(self, state: Any) -> float | None:
        """Return the largest global norm that this rule, in this state, would accept; None where it has no such
        limit. Computed from the past alone, so that a treatment can compare the present with it on the device."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an action asks of the trainer.

    Attributes:
        kind: `"lower_learning_rate"`, `"checkpoint"`, `"stop"`, `"notify"`.
        reason: the sentence to show.
        values: settings of the request (`factor`, `steps`, ...).
    """

    kind: str
    reason: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


class Context(Protocol):
    """What a treatment is told about the step, beside the gradients.

    Attributes:
        step: optimizer steps taken so far.
        optimizers: those that will step now.
        rule: name of the rule it runs behind, or "" for every step.
        trigger: whether the rule fired: True, False, or a 0-dim bool tensor on the device that must not be read
            (then the treatment works with `where`). True for treatments that run on every step.
        limit: the rule's own limit for the global norm, or None.
        findings: of the rule at this step, where it was judged on the host.
        can_read: reading a value back costs nothing here (CPU), or a wait was announced.
    """

    step: int
    optimizers: Sequence[Any]
    rule: str
    trigger: Any
    limit: float | None
    findings: Sequence[Finding]
    can_read: bool

    def veto(self, flag: Any = True, *, reason: str = "") -> None:
        """Ask that the optimizer moves nothing at this step; `flag` may be a 0-dim bool tensor on the device."""
        ...

    def request(self, request: Request) -> None:
        """Ask something of the trainer."""
        ...


@runtime_checkable
class Treatment(Protocol):
    """Changes gradients, on the device, and wherever it can never looks."""

    name: str

    def apply_(self, grads: Any, context: Context) -> Mapping[str, Any] | None:
        """Change `grads` (a `gradwatch.stats.Gradients`) in place.

        Returns:
            What to report, by name: floats or 0-dim tensors (`coefficient`, `applied`, `limit`, ...), or None.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as plain values and tensors; {} where there is none."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Action(Protocol):
    """Asks something of the trainer when a rule fires; changes no gradient."""

    name: str

    def act(self, incident: Incident, context: Context) -> None:
        """Leave `context.request(Request(...))`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMeta:
    """What a sink is told when it opens.

    Attributes:
        name: of the callback; the TensorBoard tags begin with it.
        run_dir: where files may be written, or None.
        started: seconds since the epoch.
        options: what was asked for, plain values.
        versions: of gradwatch, torch, ...
        model: class name of the model.
        start_step: the step the run begins or resumes at.
    """

    name: str = "gradwatch"
    run_dir: str | None = None
    started: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    start_step: int = 0


@runtime_checkable
class Sink(Protocol):
    """Where records go. It knows records and one writer; nothing of models or rules.

    `write` is called at the sink's cadence with one record; between two writes `observe` is not needed: the engine
    hands over `window`, the records since the last write (newest last), so that maxima over the window are right.
    """

    def open(self, meta: RunMeta) -> None: ...
    def write(self, record: StepRecord, window: Sequence[StepRecord]) -> None: ...
    def incident(self, incident: Incident) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
