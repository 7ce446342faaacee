"""What a rule is: frozen settings and a pure check. Its memory is a value that someone else keeps."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

import numpy as np

from .._adopt import Bases, adopted
from .._text import shown
from ..errors import ConfigError, UnknownNameError
from ..protocols import Action, Treatment, as_action_or_treatment
from ..records import SEVERITIES, Bools, Finding, Floats, StepRecord, snake_case
from ._block import Block, Passed
from ._findings import Findings
from ._selection import first_in_order

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Any:
        return lambda cls: cls


__all__ = ["RULE", "Rule", "State", "as_rule"]

MAX_PATTERN = 500
MAX_NAME = 300

State = dict[str, Any]
"""Memory of a rule: plain values by name. Arrays over paths live under the key "per_path", as name -> array (n,)."""


@dataclass_transform(kw_only_default=True, frozen_default=True, eq_default=False, field_specifiers=(field,))
class _Settings:
    """Makes every subclass of `Rule` a frozen dataclass with the common settings after its own.

    `Rule` itself stays a plain class: command-line parsers accept subclasses of those alone.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__name__ == "Rule" and cls.__module__ == __name__:
            return
        if "__init__" in cls.__dict__:
            return
        own = dict(inspect.get_annotations(cls))
        for name, hint in _common_hints().items():
            if name not in own:
                own[name] = hint
                if name not in cls.__dict__:
                    setattr(cls, name, getattr(cls, name))
        cls.__annotations__ = own
        dataclass(frozen=True, kw_only=True, eq=False)(cls)


class Rule(_Settings):
    """Reads records, reports findings. Subclass it, annotate your settings, and write `judge`.

    Every subclass becomes a frozen dataclass with keyword-only settings: its own, then the common ones below.

    Args:
        name: what the user calls it; else the class name in snake case.
        paths: glob patterns of the paths it looks at (`*` crosses dots).
        severity: info, warning or critical.
        for_steps: optimizer steps the condition must hold before it fires; above 1, at least two judgements.
        keep_firing_for: optimizer steps it stays firing after the condition clears.
        warmup: optimizer steps, from the first one seen, on which it never fires.
        cooldown: steps after an incident was resolved in which the same incident is opened again, not a new one.
        then: treatments and actions to run when it fires.
        labels: shown with the incident.
        advice: what usually causes it and what to try, in order.
        max_fires: incidents after which it says nothing more; 0: no bound.
        max_actions: times its actions may run in any `action_window` steps. Treatments are not bounded.
        action_window: see `max_actions`.
        treat_after: judgements in a row it must fire before `then` runs; those before are only reported.
        stop_after: judgements in a row it fires that end in a stop; 0: never.
        inhibits: names of rules that stay silent while this one fires.
        inhibit_for: steps they stay silent after it fired last.
    """

    name: str = ""
    paths: str | Sequence[str] = "*"
    severity: str = "warning"
    for_steps: int = 1
    keep_firing_for: int = 20
    warmup: int = 0
    cooldown: int = 200
    then: Treatment | Action | Sequence[Treatment | Action] = ()
    labels: Mapping[str, str] | None = None
    advice: str = ""
    max_fires: int = 0
    max_actions: int = 5
    action_window: int = 1000
    treat_after: int = 1
    stop_after: int = 0
    inhibits: Sequence[str] = ()
    inhibit_for: int = 0

    needs: ClassVar[frozenset[str]] = frozenset()
    """Columns and scalars it reads."""
    enough: ClassVar[int] = 1
    """Judgements after which it has seen enough to say that all is well."""
    is_core: ClassVar[bool] = True
    """Whether a run can't be called healthy before it has judged. False for rules that read what only some trainings
    have, or what is only sampled: without what they need they are listed, and no more."""
    order: ClassVar[str] = "forward"
    """Where an incident began: the first of its paths in "forward" or "backward" order."""
    low_is_worse: ClassVar[bool] = False
    """Whether the smallest value is the worst one."""
    awaits: ClassVar[frozenset[str]] = frozenset()
    """Columns and scalars without any of which `judge` has nothing to judge, and leaves the memory as it is."""

    def __post_init__(self) -> None:
        put = object.__setattr__
        if not isinstance(self.name, str) or len(self.name) > MAX_NAME:
            raise ConfigError(f"`name` of a rule is a text of at most {MAX_NAME} characters. Got {shown(self.name)}.")
        put(self, "name", self.name or self.rule_name)
        paths = (self.paths,) if isinstance(self.paths, str) else tuple(self.paths)
        if not paths or not all(isinstance(p, str) and p for p in paths):
            raise ConfigError(f"`paths` of {self.name!r} must be one glob pattern or several. Got {self.paths!r}.")
        if any(len(p) > MAX_PATTERN for p in paths):
            raise ConfigError(f"a pattern in `paths` of {self.name!r} has at most {MAX_PATTERN} characters.")
        put(self, "paths", paths)
        then = tuple(self.then) if isinstance(self.then, (list, tuple)) else (self.then,)
        what = f"`then` of {self.name!r} takes treatments and actions"
        put(self, "then", tuple(as_action_or_treatment(item, what) for item in then))
        put(self, "labels", {str(k): str(v) for k, v in (self.labels or {}).items()})
        put(self, "inhibits", (self.inhibits,) if isinstance(self.inhibits, str) else tuple(self.inhibits))
        if self.severity not in SEVERITIES:
            raise UnknownNameError("severity", self.severity, SEVERITIES, where=f"rule {self.name!r}")
        lowest = {"for_steps": 0, "keep_firing_for": 0, "warmup": 0, "cooldown": 0, "max_fires": 0, "max_actions": 0}
        lowest |= {"action_window": 1, "treat_after": 1, "stop_after": 0, "inhibit_for": 0}
        for setting, low in lowest.items():
            self._require(setting, isinstance(getattr(self, setting), int) and getattr(self, setting) >= low, low)

    @property
    def rule_name(self) -> str:
        """Class name in snake case."""
        return snake_case(type(self).__name__)

    @property
    def wants(self) -> frozenset[str]:
        """Columns and scalars it reads, as set up: `needs` unless the settings change it."""
        return self.needs

    @property
    def reach(self) -> int:
        """How many records before one in which it holds what it holds on may have begun."""
        return 0

    def init(self) -> Any:
        """Return the memory before the first record."""
        return {}

    def judge(self, record: StepRecord, state: Any) -> tuple[Sequence[Finding], Any]:
        """Return what this record shows, and the memory to pass with the next one. Pure."""
        raise NotImplementedError(f"{type(self).__name__} has no `judge`.")

    def pass_over(self, block: Block, state: Any) -> Passed | None:
        """Return what the rule remembers after records in which it finds nothing; None to be asked about each of them.

        Judging record by record costs every step; most steps are ordinary, and can be told so for many at once. It must
        come to the same memory, and never pass over what `judge` would find. The default passes over records that have
        nothing of what the rule `awaits`.
        """
        if not self.awaits or block.has_any(self.awaits):
            return None
        said, after = self.judge(block.records[-1], state)
        if isinstance(said, Findings) and said.judged is False and after is state:
            return Passed(state, 0, said.reason)
        return None

    def limit(self, state: Any) -> float | None:
        """Return the largest global norm it would accept in this state; None where it has no such limit."""
        return None

    def alarm(self, state: Any) -> float | None:
        """Return the global norm above which it fires at the next record: where its treatments begin to act. They then
        bring the norm to `limit`, which may be lower. None where no norm alone makes it fire now."""
        return self.limit(state)

    def calm(self, state: Any, records: int) -> float:
        """Return the global norm up to which it certainly finds nothing in that norm, in so many records from now on:
        a larger one wakes the judge at once. inf where it does not judge norms, or lets them wait."""
        limit = self.limit(state)
        return math.inf if limit is None else limit

    def acts(self, record: StepRecord) -> bool:
        """Return whether what it finds in a record is ground enough for its treatments; else it is only reported."""
        return True

    def first_path(self, record: StepRecord, positions: Any) -> str:
        """Return where an incident at these places of the index began; "" for the whole model."""
        return first_in_order(record.index, positions, self.order)

    # What `judge` returns is made with one of these four.

    def over(
        self, record: StepRecord, true: Bools, judged: Bools, values: Floats, limit: Floats | float, text: str = ""
    ) -> Findings:
        """Return findings per path: `true`, `judged`, `values` have shape (len(index),)."""
        positions = np.flatnonzero(true)
        limits = limit[positions] if isinstance(limit, np.ndarray) else np.full(len(positions), limit)
        return Findings(self, record, positions, values[positions], limits, judged=judged, text=text)

    def whole(self, record: StepRecord, true: bool, value: float, limit: float, text: str = "") -> Findings:
        """Return one finding for the whole model, or none."""
        if not true:
            return Findings(self, record, _NOTHING, _NO_VALUES, _NO_VALUES, judged=True)
        position = np.array([len(record.index)])
        return Findings(self, record, position, np.array([value]), np.array([limit]), judged=True, text=text)

    def clear(self, record: StepRecord) -> Findings:
        """Return no findings: judged, and nothing is wrong."""
        return self.whole(record, False, 0.0, 0.0)

    def unjudged(self, record: StepRecord, reason: str) -> Findings:
        """Return no findings, for a record that does not have what the rule needs."""
        return Findings(self, record, _NOTHING, _NO_VALUES, _NO_VALUES, judged=False, reason=reason)

    def _require(self, setting: str, holds: Any, expected: object, what: str = "at least") -> None:
        """Raise unless `holds` is true; write the condition so that nan fails."""
        if not holds:
            raise ConfigError(
                f"`{setting}` of {self.name!r} must be {what} {expected}. Got {getattr(self, setting)!r}."
            )


RULE: Bases = {Rule: ("judge",)}
"""What an object must have at least to be taken for a rule."""


def as_rule(given: Any) -> Rule:
    """Return the object as a rule.

    Raises:
        ConfigError: it is none.
    """
    rule: Rule = adopted(given, "a RuleBook takes rules, such as Exploding()", RULE)
    return rule


_NOTHING = np.zeros(0, np.int64)
_NO_VALUES = np.zeros(0)
_HINTS: dict[str, Any] = {}


def _common_hints() -> dict[str, Any]:
    # As objects, not strings: a subclass in another module need not import what they name.
    if not _HINTS:
        own = set(Rule.__annotations__) - {"needs", "order", "low_is_worse"}
        _HINTS.update({k: v for k, v in get_type_hints(Rule).items() if k in own})
    return {k: _HINTS[k] for k in Rule.__annotations__ if k in _HINTS}
