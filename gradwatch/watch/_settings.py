"""What the doors take, checked and resolved once: names become objects here and nowhere below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..book import load_rules
from ..errors import ConfigError, UnknownNameError
from ..protocols import Sink, Treatment
from ..rules import RuleBook
from ..treatments import TREATMENTS, MicroBatchSurgery, Surgery
from ._options import MeasureOptions

__all__ = ["Settings", "resolve"]


@dataclass(frozen=True)
class Settings:
    """Everything that was asked for, resolved.

    Attributes:
        book: the rules.
        treatments: for every step.
        surgery: between task gradients, or None.
        options: what to measure.
        sinks: given by the user; None: the adapter chooses.
        name: of the run; tags and state keys begin with it.
        log_every: optimizer steps between two log entries; None: the trainer's own.
    """

    book: RuleBook
    treatments: tuple[Treatment, ...]
    surgery: Any
    options: MeasureOptions
    sinks: tuple[Sink, ...] | None
    name: str
    log_every: int | None


def resolve(
    *,
    rules: Any = "default",
    treatments: Any = (),
    surgery: Any = None,
    sinks: Sequence[Sink] | None = None,
    name: str = "gradwatch",
    log_every: int | None = None,
    **options: Any,
) -> Settings:
    """Check and resolve what a door was given.

    Raises:
        ConfigError: a setting that can't be; `UnknownNameError` with the nearest names for one that is not known.
    """
    known = MeasureOptions.__dataclass_fields__
    for option in options:
        if option not in known:
            raise UnknownNameError("option", option, [*known, "rules", "treatments", "surgery", "sinks", "name"])
    if not isinstance(name, str) or not name or "/" in name:
        raise ConfigError(f"`name` must be a word without '/'. Got {name!r}.")
    if log_every is not None and (isinstance(log_every, bool) or not isinstance(log_every, int) or log_every < 1):
        raise ConfigError(f"`log_every` must be a number of optimizer steps, 1 or more, or None. Got {log_every!r}.")
    return Settings(
        book=load_rules(rules),
        treatments=_treatments(treatments),
        surgery=_surgery(surgery),
        options=MeasureOptions(**options),
        sinks=None if sinks is None else _sinks(sinks),
        name=name,
        log_every=log_every,
    )


def _treatments(given: Any) -> tuple[Treatment, ...]:
    if given is None:
        return ()
    if isinstance(given, str) or not isinstance(given, Iterable):
        given = [given]
    found = []
    for item in given:
        if isinstance(item, str):
            if item not in TREATMENTS:
                raise UnknownNameError("treatment", item, TREATMENTS)
            item = TREATMENTS[item]()
        if isinstance(item, type) or not isinstance(item, Treatment):
            what = f"the class {item.__name__}; did you forget the brackets" if isinstance(item, type) else repr(item)
            raise ConfigError(f"`treatments` takes objects with `apply_`, such as ClipByGlobalNorm(1.0). Got {what}.")
        found.append(item)
    return tuple(found)


def _surgery(given: Any) -> Any:
    if given is None or isinstance(given, (Surgery, MicroBatchSurgery)):
        return given
    if isinstance(given, str) or (callable(given) and not isinstance(given, type)):
        return Surgery(given)
    raise ConfigError(f"`surgery` takes the name of a method, a Surgery(...) or MicroBatchSurgery(...). Got {given!r}.")


def _sinks(given: Any) -> tuple[Sink, ...]:
    found = [given] if isinstance(given, Sink) else list(given)
    for sink in found:
        if not isinstance(sink, Sink):
            raise ConfigError(f"{sink!r} is no sink: it needs the methods open, write, incident, flush and close.")
    return tuple(found)
