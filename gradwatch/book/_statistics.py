"""Statistics of one's own by name: registered under an entry point, or named as `module:Class`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from .._text import shown
from ..errors import ConfigError, UnknownNameError
from ..protocols import Statistic
from ..records import SCALAR, Column, add_column, column_of
from ._build import allowed_class, made
from ._registered import registered

__all__ = ["GROUP", "add_scalars", "load_statistics"]

GROUP = "gradwatch.statistics"
"""Entry points under which packages register theirs."""


_BUILT_IN = {
    "activation_formats": "gradwatch.precision:ActivationFormats",
    "adam_update_rms": "gradwatch.ahead:AdamUpdateRms",
    "attention": "gradwatch.attention:AttentionScores",
    "dormant_units": "gradwatch.ahead:DormantUnits",
    "effective_rank": "gradwatch.ahead:EffectiveRank",
    "gradient_formats": "gradwatch.precision:GradientFormats",
    "gradient_turn": "gradwatch.ahead:GradientTurn",
    "step_curvature": "gradwatch.ahead:StepCurvature",
    "weight_spectra": "gradwatch.ahead:WeightSpectra",
}
"""Those that come with gradwatch, by name; imported where they are asked for."""


def load_statistics(given: Any, where: str = "statistics", *, allow_code: bool = True) -> tuple[Statistic, ...]:
    """Return the statistics that names and objects stand for, and tell expressions of their columns.

    Args:
        given: one or several: an object, the name of a built-in or registered one, `"module:Class"`, or a mapping of
            one of these to settings by name.
        where: said with an error.
        allow_code: `"module:Class"` may be imported: a program says so of its own, a rules file is asked first.

    Raises:
        ConfigError: what is no statistic, with the nearest names for one that is not known.
    """
    several = isinstance(given, Iterable) and not isinstance(given, (str, Mapping))
    found = [_one(item, where, allow_code) for item in (given if several else [given])]
    names = [statistic.name for statistic in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{where}: two statistics are named {name!r}.")
    for statistic in found:
        for column in statistic.columns():
            add_column(column)
    return tuple(found)


def add_scalars(names: Any, where: str) -> None:
    """Tell expressions of numbers that the user puts on record: names, or a mapping of names to their meaning.

    Raises:
        ConfigError: a name that can't be one.
    """
    if not isinstance(names, (str, Mapping, list, tuple)):
        raise ConfigError(f"{where}: `scalars` takes names, or names with their meaning. Got {shown(names)}.")
    listed = [names] if isinstance(names, str) else names
    told = names if isinstance(names, Mapping) else dict.fromkeys(map(_name, listed), "")
    for name, meaning in told.items():
        known = column_of(name) if isinstance(name, str) else None
        if known is not None and known.kind == SCALAR and not meaning:
            continue
        try:
            add_column(Column(name=name, kind=SCALAR, meaning=str(meaning or f"`{name}`, as the user recorded it.")))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error


def _name(given: Any) -> Any:
    return given if isinstance(given, str) else shown(given)


def _one(item: Any, where: str, allow_code: bool) -> Statistic:
    settings: Mapping[str, Any] = {}
    if isinstance(item, Mapping) and len(item) == 1:
        item, settings = next(iter(item.items()))
        settings = {} if settings is None else settings
    if isinstance(item, str):
        if ":" in item:
            cls = allowed_class(item, where, _is_statistic, "a class of statistics", allow=allow_code)
        else:
            cls = _registered(item, where)
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{where}: settings of {item!r} are a mapping. Got {shown(settings)}.")
        item = made(cls, settings, where, f"{cls!r}: ")
    if isinstance(item, type) or not isinstance(item, Statistic):
        what = f"the class {item.__name__}; did you forget the brackets" if isinstance(item, type) else repr(item)
        raise ConfigError(f"{where}: a statistic is an object with `sums` and `finish`. Got {what}.")
    return item


def _is_statistic(cls: type) -> bool:
    return all(callable(getattr(cls, name, None)) for name in ("columns", "sums", "maxima", "finish"))


def _registered(name: str, where: str) -> Any:
    if name in _BUILT_IN:
        module, _, cls = _BUILT_IN[name].partition(":")
        return getattr(import_module(module), cls)
    known = registered(GROUP)
    if name not in known:
        raise UnknownNameError("statistic", name, [*_BUILT_IN, *known], where=where)
    return known[name].load()
