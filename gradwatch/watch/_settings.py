"""What the doors take, checked and resolved once: names become objects here and nowhere below."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..book import load_rules, load_statistics
from ..errors import ConfigError, UnknownNameError
from ..notebook import LiveCell
from ..protocols import Sink, Statistic, Treatment, as_sink
from ..rules import RuleBook
from ..treatments import MicroBatchSurgery, Surgery
from ._given_treatments import given_treatments
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
        statistics: the user's own measurements, those of the rules file among them.
        live: seconds between two drawings of a live cell; 0: none.
        what_if: try the training again at its first critical incident: True, or with this loss function.
    """

    book: RuleBook
    treatments: tuple[Treatment, ...]
    surgery: Any
    options: MeasureOptions
    sinks: tuple[Sink, ...] | None
    name: str
    log_every: int | None
    statistics: tuple[Statistic, ...] = ()
    live: float = 0.0
    what_if: bool | Callable[..., Any] = False


def resolve(  # noqa: PLR0913 - the doors' flat names
    *,
    rules: Any = "default",
    treatments: Any = (),
    surgery: Any = None,
    sinks: Sequence[Sink] | None = None,
    name: str = "gradwatch",
    log_every: int | None = None,
    statistics: Any = (),
    allow_code: bool = False,
    live: bool | float = False,
    what_if: bool | Callable[..., Any] = False,
    **options: Any,
) -> Settings:
    """Check and resolve what a door was given.

    Raises:
        ConfigError: a setting that can't be; `UnknownNameError` with the nearest names for one that is not known.
    """
    known = MeasureOptions.__dataclass_fields__
    for option in options:
        if option not in known:
            raise UnknownNameError(
                "option",
                option,
                [
                    *known,
                    "rules",
                    "treatments",
                    "surgery",
                    "sinks",
                    "statistics",
                    "name",
                    "allow_code",
                    "live",
                    "what_if",
                ],
            )
    if not isinstance(name, str) or not name or "/" in name:
        raise ConfigError(f"`name` must be a word without '/'. Got {name!r}.")
    if log_every is not None and (isinstance(log_every, bool) or not isinstance(log_every, int) or log_every < 1):
        raise ConfigError(f"`log_every` must be a number of optimizer steps, 1 or more, or None. Got {log_every!r}.")
    if not isinstance(what_if, bool) and not callable(what_if):
        raise ConfigError(f"`what_if` must be True, False or the loss function. Got {what_if!r}.")
    own = load_statistics(statistics)  # before the rules: expressions may name them
    book = load_rules(rules, allow_code=allow_code)
    return Settings(
        book=book,
        treatments=given_treatments(treatments),
        surgery=_surgery(surgery),
        options=MeasureOptions(**options),
        sinks=None if sinks is None else _sinks(sinks),
        name=name,
        log_every=log_every,
        statistics=tuple({s.name: s for s in (*book.statistics, *own)}.values()),
        live=_live(live),
        what_if=what_if,
    )


def _live(given: Any) -> float:
    if given is False or given is None:
        return 0.0
    return (LiveCell() if given is True else LiveCell(given)).seconds


def _surgery(given: Any) -> Any:
    if given is None or isinstance(given, (Surgery, MicroBatchSurgery)):
        return given
    if isinstance(given, str) or (callable(given) and not isinstance(given, type)):
        return Surgery(given)
    raise ConfigError(f"`surgery` takes the name of a method, a Surgery(...) or MicroBatchSurgery(...). Got {given!r}.")


def _sinks(given: Any) -> tuple[Sink, ...]:
    if isinstance(given, type) or not isinstance(given, Iterable):
        given = [given]
    return tuple(as_sink(sink) for sink in given)
