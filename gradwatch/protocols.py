"""What the floors above agree on: treatments, actions, sinks and statistics, with every member and its default.

One's own derive from these classes (a rule from `gradwatch.rules.Rule`, a statistic from `gradwatch.stats.Statistic`),
and write what they need otherwise. An object that derives from none of them, and has what is needed, is adopted where
it is handed over: it gets the defaults for what it lacks.

Rules never import treatments: a rule's `then` holds any `Treatment` or `Action`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from ._adopt import Bases, adopted
from .records import CaseFile, Column, Finding, Incident, StepRecord, Verdict
from .requests import Request

__all__ = [
    "ACTION_OR_TREATMENT",
    "Action",
    "Context",
    "Hooks",
    "Rule",
    "RunMeta",
    "Sink",
    "Statistic",
    "Treatment",
    "as_action_or_treatment",
    "as_sink",
    "as_treatment",
    "name_of_class",
]


def name_of_class(name: str) -> str:
    """Return what a treatment's or an action's class is called in rules files: "skip_step" for "SkipStep"."""
    # "ZClip" is "zclip".
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


class Rule(Protocol):
    """What an object must have to be judged by; `gradwatch.rules.Rule` has the rest, with its defaults."""

    def init(self) -> Any:
        """Return the memory before the first record: plain values and numpy arrays only."""
        ...

    def judge(self, record: StepRecord, state: Any) -> tuple[Sequence[Finding], Any]:
        """Return what this record shows, and the memory to pass with the next one. Pure."""
        ...


class Context(Protocol):
    """What a treatment is told about the step, beside the gradients.

    Attributes:
        step: optimizer steps taken so far.
        optimizers: those that will step now.
        rule: name of the rule it runs behind, or "" for every step.
        trigger: whether the rule fired: True, False, or a 0-dim bool tensor on the device that must not be read
            (then the treatment works with `where`). For treatments that run on every step True, or such a tensor where
            a loss scaler may drop the step by itself.
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
        """Ask something of the trainer: one of `gradwatch.requests`.

        Raises:
            ConfigError: another.
        """
        ...


class Hooks(Protocol):
    """What a treatment has put on a model.

    Attributes:
        grad_scale: what the loss of the coming backward is multiplied by; set before each.
    """

    grad_scale: float

    def remove(self) -> None:
        """Take them off. May be called twice."""
        ...


class _Named:
    name: str = ""
    """By default the class name in snake case."""
    names_code: ClassVar[tuple[str, ...]] = ()
    """Settings that may name code to import; a rules file needs leave for that."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" not in cls.__dict__:
            cls.name = name_of_class(cls.__name__)


class Treatment(_Named):
    """Changes gradients, on the device, and wherever it can never looks. Write `apply_`.

    Attributes:
        order: place among the treatments of one step, small first: guards (10), scale (20), centralize (30), clips of
            units and tensors (40), clips of the whole gradient (50), noise (60).
        learns: keeps statistics of the steps it sees: behind a rule it wants to be applied at every step, with a False
            trigger where the rule did not fire.
        needs_host: works only where its trigger can be read: every step must wait for the rule's verdict.
        moves_weights: `stepped` is to be called.
    """

    order: ClassVar[int] = 50
    learns: ClassVar[bool] = False
    needs_host: ClassVar[bool] = False
    moves_weights: ClassVar[bool] = False

    def bind(self, model: Any) -> None:
        """Look at the model once, before the first step. By default nothing."""

    def install(self, model: Any) -> Hooks | None:
        """Put hooks on the model, for what acts inside backward; None, the default, where nothing does."""
        return None

    def apply_(self, grads: Any, context: Context) -> Mapping[str, Any] | None:
        """Change `grads` (a `gradwatch.stats.Gradients`) in place.

        Returns:
            What to report, by name: floats or 0-dim tensors (`coefficient`, `applied`, `limit`, ...), or None.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `apply_`.")

    def settle(self, values: Mapping[str, float], context: Context) -> Mapping[str, float]:
        """Hear what the device decided, once its numbers have come to the host: for those that keep count.

        Args:
            values: what `apply_` returned, as numbers.

        Returns:
            What is to be added to the report; by default nothing.
        """
        return {}

    def stepped(self, optimizer: Any) -> None:
        """Hear that an optimizer has moved the weights, with `moves_weights`; not after a step that was vetoed. By
        default nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as plain values and tensors on the CPU; {}, the default, where there is none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the memory of another of the same settings."""


class Action(_Named):
    """Asks something of the trainer when a rule fires; changes no gradient. Write `act`."""

    def act(self, incident: Incident, context: Context) -> None:
        """Leave `context.request(...)`, with one of `gradwatch.requests`."""
        raise NotImplementedError(f"{type(self).__name__} has no `act`.")


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


class Sink:
    """Where records go. It knows records and one writer; nothing of models or rules. By default it does nothing.

    Attributes:
        every: optimizer steps between two writes; None: the run's own.
        never_hangs: its `close` waits for nothing but the disk, and is called again where Ctrl-C fell into it.
    """

    every: int | None = None
    never_hangs: bool = False

    @property
    def trouble(self) -> str:
        """Why not all that it was handed is kept; "" where it is."""
        return ""

    def open(self, meta: RunMeta) -> None:
        """The run begins, or goes on."""

    def write(self, record: StepRecord, window: Sequence[StepRecord]) -> None:
        """Take the newest record.

        Args:
            window: the records since the last write, the newest last: maxima over it lose no spike.
        """

    def resumed(self, step: int) -> None:
        """The run goes on from a step; what was written of it and later ones is written again."""

    def incident(self, incident: Incident) -> None:
        """An incident began, changed or is over."""

    def case(self, case: CaseFile, batch: bytes | None = None) -> None:
        """Keep what is known of an incident: when it has opened, and once more when what came after is known.

        Args:
            batch: its batch as a safetensors file, once, where batches are saved.
        """

    def annotate(self, **annotation: Any) -> None:
        """Keep what rules were told between two records (`text`, `silence`, `paths`, `rules`; or `closing`)."""

    def summary(self, text: str) -> None:
        """Keep the words said at the end of the run."""

    def report(self, path: str | os.PathLike[str]) -> None:
        """Keep a file, such as the HTML report."""

    def judged(self, verdict: Verdict, ended: str) -> None:
        """Keep what each rule judged, and how the run ended: whoever reads it comes to the same verdict."""

    def ended(self, why: str) -> None:
        """Keep how a run ended that did not come to its end."""

    def arrived(self, record: StepRecord) -> None:
        """Keep a record whose numbers are there before it is judged; `write` hands the same object over again."""

    def at_exit(self) -> None:
        """The interpreter ends, and nobody closed the run."""

    def flush(self) -> None:
        """Let nothing be held back."""

    def close(self) -> None:
        """Write what is left. May be called twice."""


@runtime_checkable
class Statistic(Protocol):
    """A measurement of one's own, on record as a column or a number of its name.

    `gradwatch.stats.Statistic` is the class to derive from: it documents each member, and brings defaults.

    Attributes:
        name: on record and in expressions.
        needs: what `sums` and `maxima` are shown.
        every: measured at one optimizer step in this many.
        num_sums, num_maxima: numbers per row; the layout of what travels over ranks.
        whole: says nothing of a tensor of which a rank holds a piece.
    """

    name: str
    needs: frozenset[str]
    every: int
    num_sums: int
    num_maxima: int
    whole: bool

    def columns(self) -> Sequence[Column]:
        """Return what it puts on record."""
        ...

    def sums(self, view: Any) -> Any:
        """Return numbers, unread, that merge by addition: a tensor (n, num_sums), or None for none at this step."""
        ...

    def maxima(self, view: Any) -> Any:
        """Return numbers, unread, of which the largest counts: a tensor (n, num_maxima), or None."""
        ...

    def finish(self, sums: Any, maxima: Any) -> Any:
        """Return what goes on record, from the merged numbers on the host."""
        ...


_TREATMENT: Bases = {Treatment: ("apply_",)}
_SINK: Bases = {Sink: ("open", "write", "incident", "flush", "close")}
ACTION_OR_TREATMENT: Bases = {**_TREATMENT, Action: ("act",)}
"""What may stand behind a rule."""


def as_treatment(given: Any) -> Treatment:
    """Return the object as a treatment.

    Raises:
        ConfigError: it is none.
    """
    what = "a treatment is an object with `apply_`, such as ClipByGlobalNorm(1.0)"
    found: Treatment = adopted(given, what, _TREATMENT)
    return found


def as_action_or_treatment(given: Any, what: str) -> Treatment | Action:
    """Return what may stand behind a rule.

    Args:
        what: said with an error.

    Raises:
        ConfigError: it is neither.
    """
    found: Treatment | Action = adopted(given, what, ACTION_OR_TREATMENT)
    return found


def as_sink(given: Any) -> Sink:
    """Return the object as a sink.

    Raises:
        ConfigError: it is none.
    """
    found: Sink = adopted(given, "a sink has the methods open, write, incident, flush and close", _SINK)
    return found
