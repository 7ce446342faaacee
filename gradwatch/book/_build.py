"""One entry of a rules file -> one rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from typing import Any

from .._adopt import fits
from .._text import shown
from .._warn import one_line
from ..errors import ConfigError, UnknownNameError
from ..protocols import ACTION_OR_TREATMENT, Action, Treatment
from ..rules import RULE, RULES
from ._registered import registered
from ._yaml import Lines, ListAt

__all__ = ["allowed_class", "build_rule", "import_class", "settings_of"]

RULE_GROUP, TREATMENT_GROUP = "gradwatch.rules", "gradwatch.treatments"
"""Entry points under which packages register theirs: rules; treatments and actions."""

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
    cls = _rule_class(kind, lines, where)
    then = settings.pop("then", None)
    values = {_ALIASES.get(k, k): v for k, v in settings.items()}
    names = settings_of(cls)
    for key in values:
        if key not in names:
            raise UnknownNameError(f"setting of {kind!r}", key, names, where=lines.at(node, key))
    if then is not None:
        values["then"] = build_then(then, lines, lines.at(node, "then"))
    name = values.get("name") or (kind if kind in RULES else cls.__name__)
    if not isinstance(name, str):
        raise ConfigError(f"{lines.at(node, 'name')}: `name` is a text. Got {shown(name)}.")
    past = known.get(name)
    if past is not None and type(past) is cls and is_dataclass(past):
        return name, made(lambda **v: replace(past, **v), values, where)  # type: ignore[type-var]
    rule = made(cls, values, where)
    return rule.name, rule


def made(make: Any, settings: Mapping[str, Any], where: str, what: str = "") -> Any:
    """Return what a class makes of settings from a file; whatever it raises says where they stand.

    Raises:
        ConfigError: the settings can't be.
    """
    try:
        return make(**settings)
    except Exception as error:
        told = error if isinstance(error, (TypeError, ValueError, AttributeError)) else one_line(error)
        raise ConfigError(f"{where}: {what}{told}") from error


def _parts(entry: Any, where: str) -> tuple[str, Any, Any]:
    if isinstance(entry, str):
        return entry, {}, None
    if not isinstance(entry, Mapping) or not entry:
        raise ConfigError(f"{where}: a rule is a name, or a mapping that begins with one. Got {shown(entry)}.")
    kind = next(iter(entry))
    inner, beside = entry[kind], {k: v for k, v in entry.items() if k != kind}
    if not isinstance(kind, str):
        raise ConfigError(f"{where}: a rule begins with its name. Got {shown(kind)}.")
    if inner is False:
        return kind, False, entry
    if kind == "expression" and isinstance(inner, str):
        inner = {"expression": inner}
    inner = {} if inner is None else inner
    if not isinstance(inner, Mapping):
        raise ConfigError(f"{where}: settings of {kind!r} are a mapping. Got {shown(inner)}.")
    twice = sorted(map(str, set(inner) & set(beside)))
    if twice:
        raise ConfigError(f"{where}: {twice[0]!r} is given twice, inside {kind!r} and beside it.")
    merged = {**inner, **beside}
    return kind, merged, entry


def _rule_class(kind: str, lines: Lines, where: str) -> Any:
    if ":" in kind:
        return allowed_class(kind, where, _is_rule, "a rule class (with `judge`)", allow=lines.allow_code)
    if kind in RULES:
        return RULES[kind]
    own = registered(RULE_GROUP)
    if kind not in own:
        raise UnknownNameError("rule", kind, [*RULES, *own], where=where)
    return _checked(own[kind].load(), kind, where, _is_rule, "a rule class (with `judge`)")


def _is_rule(cls: type) -> bool:
    return fits(cls, RULE)


def _is_treatment(cls: type) -> bool:
    return fits(cls, ACTION_OR_TREATMENT)


def allowed_class(path: str, where: str, check: Callable[[type], bool], what: str, *, allow: bool) -> Any:
    """Return the class that "module:Class" names, where a file may name code.

    Importing a module runs it, so that a rules file from elsewhere could do anything: only the caller can allow it. And
    the class is looked at before it is called: `subprocess:Popen` is a class, too.

    Raises:
        ConfigError: it may not, there is no such class, or it is of another kind.
    """
    if not allow:
        raise ConfigError(
            f"{where}: {shown(path)} is code that importing would run. If you trust it, say so: allow_code=True, or "
            "--allow-code on the command line."
        )
    return _checked(import_class(path, where), path, where, check, what)


def _checked(cls: Any, name: str, where: str, check: Callable[[type], bool], what: str) -> Any:
    if not (isinstance(cls, type) and check(cls)):
        raise ConfigError(f"{where}: {name!r} is not {what}.")
    return cls


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
    except Exception as error:
        told = error if isinstance(error, ImportError) else one_line(error)
        raise ConfigError(f"{where}: the module of {shown(path)} can't be imported ({told}).") from error
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
            raise ConfigError(
                f"{place}: an entry of `then` is a name, or one name with its settings. Got {shown(entry)}."
            )
        items.append(_treatment(name, settings, lines, place))
    return tuple(items)


def _treatment(name: Any, settings: Any, lines: Lines, where: str) -> Any:
    if not isinstance(name, str) or not isinstance(settings, Mapping):
        raise ConfigError(
            f"{where}: an entry of `then` is a name with settings by name. Got {shown(name)}: {shown(settings)}."
        )
    cls = _treatment_class(name, lines, where)
    for setting in cls.names_code if issubclass(cls, (Treatment, Action)) else ():
        target = settings.get(setting)
        if isinstance(target, str) and "://" not in target and not lines.allow_code:
            raise ConfigError(
                f"{where}: `{setting}` of {name} is {shown(target)}, code that importing would run. If you trust it, "
                "say so: allow_code=True, or --allow-code on the command line."
            )
    for setting in getattr(cls, "holds_actions", ()):
        if setting in settings:
            settings = {**settings, setting: build_then(settings[setting], lines, where)}
    return made(cls, settings, where, f"{name}: ")


def _treatment_class(name: str, lines: Lines, where: str) -> Any:
    what = "a class of treatments (with `apply_`) or of actions (with `act`)"
    if ":" in name:
        return allowed_class(name, where, _is_treatment, what, allow=lines.allow_code)
    # Not at the top: rules files without `then` need no torch.
    from ..treatments import ACTIONS, TREATMENTS

    for known in (TREATMENTS, ACTIONS):
        if name in known:
            return known[name]
    own = registered(TREATMENT_GROUP)
    if name not in own:
        raise UnknownNameError("treatment or action", name, [*TREATMENTS, *ACTIONS, *own], where=where)
    return _checked(own[name].load(), name, where, _is_treatment, what)
