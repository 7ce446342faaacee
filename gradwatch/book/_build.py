"""One entry of a rules file -> one rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from typing import Any

from ..errors import ConfigError, UnknownNameError
from ..rules import RULES
from ._yaml import Lines, ListAt

__all__ = ["build_rule", "import_class", "settings_of"]

_ALIASES = {"for": "for_steps", "severities": "severity"}


def build_rule(entry: Any, lines: Lines, where: str, known: Mapping[str, Any]) -> Any:
    """Return the rule of an entry, or None with its name where the entry switches a rule off.

    Args:
        entry: `name`, or a mapping whose first key is a rule's name, "expression", or "module:Class".
        lines: of the file.
        where: "FILE:LINE" of the entry.
        known: rules so far by name; one of the same name and class lends the settings that are not given.

    Returns:
        The rule; or (name, None) for `name: off`.
    """
    kind, settings, node = _parts(entry, where)
    if settings is False:
        if kind not in known:
            raise UnknownNameError("rule to switch off", kind, known, where=where)
        return kind, None
    cls = _rule_class(kind, where)
    then = settings.pop("then", None)
    values = {_ALIASES.get(k, k): v for k, v in settings.items()}
    names = settings_of(cls)
    for key in values:
        if key not in names:
            raise UnknownNameError(f"setting of {kind!r}", key, names, where=lines.at(node, key))
    if then is not None:
        values["then"] = build_then(then, lines, lines.at(node, "then"))
    name = values.get("name") or (kind if kind in RULES else cls.__name__)
    past = known.get(name)
    try:
        if past is not None and type(past) is cls and is_dataclass(past):
            return name, replace(past, **values)  # type: ignore[type-var]
        rule = cls(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where}: {error}") from error
    return rule.name, rule


def _parts(entry: Any, where: str) -> tuple[str, Any, Any]:
    if isinstance(entry, str):
        return entry, {}, None
    if not isinstance(entry, Mapping) or not entry:
        raise ConfigError(f"{where}: a rule is a name, or a mapping that begins with one. Got {entry!r}.")
    kind = next(iter(entry))
    inner, beside = entry[kind], {k: v for k, v in entry.items() if k != kind}
    if not isinstance(kind, str):
        raise ConfigError(f"{where}: a rule begins with its name. Got {kind!r}.")
    if inner is False:
        return kind, False, entry
    if kind == "expression" and isinstance(inner, str):
        inner = {"expression": inner}
    inner = {} if inner is None else inner
    if not isinstance(inner, Mapping):
        raise ConfigError(f"{where}: settings of {kind!r} are a mapping. Got {inner!r}.")
    twice = sorted(set(inner) & set(beside))
    if twice:
        raise ConfigError(f"{where}: {twice[0]!r} is given twice, inside {kind!r} and beside it.")
    merged = {**inner, **beside}
    return kind, merged, entry


def _rule_class(kind: str, where: str) -> Any:
    if ":" in kind:
        cls = import_class(kind, where)
        if not (isinstance(cls, type) and callable(getattr(cls, "judge", None))):
            raise ConfigError(f"{where}: {kind!r} is not a rule class: it has no `judge`.")
        return cls
    if kind not in RULES:
        raise UnknownNameError("rule", kind, RULES, where=where)
    return RULES[kind]


def settings_of(cls: type) -> list[str]:
    """Return the names of what a class can be set up with."""
    if is_dataclass(cls):
        return [f.name for f in fields(cls) if f.init]
    code = cls.__init__.__code__ if hasattr(cls.__init__, "__code__") else None  # type: ignore[misc]
    return list(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]) if code else []


def import_class(path: str, where: str) -> Any:
    """Return what "module:Class" names.

    Raises:
        ConfigError: there is no such module, or it has no such name.
    """
    module_name, _, name = path.partition(":")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{where}: the module of {path!r} can't be imported ({error}).") from error
    if not hasattr(module, name):
        raise UnknownNameError(f"name in {module_name}", name, vars(module), where=where)
    return getattr(module, name)


def build_then(then: Any, lines: Lines, where: str) -> tuple[Any, ...]:
    """Return the treatments and actions of a `then`: names, or mappings of one name to its settings."""
    if not isinstance(then, list):
        then = [then]
    items = []
    for i, entry in enumerate(then):
        place = lines.at(then, i) if isinstance(then, ListAt) else where
        name: Any = entry
        settings: Any = {}
        if isinstance(entry, str):
            pass
        elif isinstance(entry, Mapping) and len(entry) == 1:
            name, settings = next(iter(entry.items()))
            settings = {} if settings is None else settings
        else:
            raise ConfigError(f"{place}: an entry of `then` is a name, or one name with its settings. Got {entry!r}.")
        items.append(_treatment(name, settings, place))
    return tuple(items)


def _treatment(name: Any, settings: Any, where: str) -> Any:
    if not isinstance(name, str) or not isinstance(settings, Mapping):
        raise ConfigError(f"{where}: an entry of `then` is a name with settings by name. Got {name!r}: {settings!r}.")
    if ":" in name:
        cls = import_class(name, where)
    else:
        # Not at the top: rules files without `then` need no torch.
        from ..treatments import ACTIONS, TREATMENTS

        if name not in TREATMENTS and name not in ACTIONS:
            raise UnknownNameError("treatment or action", name, [*TREATMENTS, *ACTIONS], where=where)
        cls = TREATMENTS[name] if name in TREATMENTS else ACTIONS[name]
    try:
        return cls(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {name}: {error}") from error
