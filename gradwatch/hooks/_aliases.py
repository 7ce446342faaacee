"""Aliases: other names for hook points, from templates with placeholders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, UnknownNameError, UnknownPathError
from ._names import ModelNames
from ._points import PORTS, HookPoint
from ._views import View

__all__ = ["Alias", "Unavailable", "expand_aliases"]

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Alias:
    """What an alias means, when it is more than a path.

    Attributes:
        target: `PATH:PORT`, with the same placeholders as the alias.
        view: shows the tensor in another form.
        leaf: which tensor of a nested input or output; `"first"` for the first.
        writing: `"replace"`, `"in_place"` or `"refuse"`, see `HookPoint`.
        optional: leave the alias out, silently, where the model has no such path.
    """

    target: str
    view: View | None = None
    leaf: str | None = None
    writing: str = "replace"
    optional: bool = False


@dataclass(frozen=True)
class Unavailable:
    """A name that the model can't offer, and why.

    Attributes:
        reason: a clause: "attention is computed functionally inside it".
        where: path whose every match gives one such name, with the same placeholders; None for just one.
    """

    reason: str
    where: str | None = None


def expand_aliases(names: ModelNames, given: Mapping[str, Any]) -> dict[str, HookPoint]:
    """Return alias -> hook point for the aliases given.

    Raises:
        UnknownPathError: a given alias leads nowhere.
        ConfigError: its placeholders differ from its target's.
    """
    found: dict[str, HookPoint] = {}
    for name, meaning in given.items():
        found.update(_expand(names, name, meaning, required=True))
    return found


def _expand(names: ModelNames, template: str, meaning: Any, *, required: bool) -> dict[str, HookPoint]:
    if isinstance(meaning, Unavailable):
        return _unavailable(names, template, meaning)
    alias = meaning if isinstance(meaning, Alias) else Alias(target=str(meaning))
    path, colon, port = alias.target.rpartition(":")
    path, port = (path, port) if colon else (alias.target, "output")
    if port not in PORTS:
        raise UnknownNameError("port", port, PORTS, where=f"alias {template!r}")
    _check_placeholders(template, path)
    parameters = port in ("grad", "accumulated_grad")
    table: Mapping[str, Any] = names.parameters if parameters else names.modules
    found = {}
    for name, canonical, values in _matches(names, path, parameters=parameters):
        point = HookPoint(canonical, port, table[canonical], name=_fill(template, values))
        point.view, point.leaf, point.writing = alias.view, alias.leaf, alias.writing
        point.other_names = tuple(n for n in (name, *names.other_names.get(canonical, ())) if n != canonical)
        found[point.name] = point
    if not found and required and not alias.optional:
        raise UnknownPathError(path, table, model_name=names.model_name, kind=f"path for the alias {template!r}")
    return found


def _unavailable(names: ModelNames, template: str, meaning: Unavailable) -> dict[str, HookPoint]:
    filled = [template]
    if meaning.where is not None:
        _check_placeholders(template, meaning.where)
        filled = [_fill(template, values) for _, _, values in _matches(names, meaning.where, parameters=False)]
    found = {}
    for name in filled:
        point = HookPoint("", "output", names.modules[""], name=name)
        point.reason = meaning.reason
        found[name] = point
    return found


def _check_placeholders(template: str, path: str) -> None:
    wanted, there = set(_PLACEHOLDER.findall(template)), set(_PLACEHOLDER.findall(path))
    if wanted != there:
        raise ConfigError(
            f"the alias {template!r} and its target {path!r} need the same placeholders. Got {sorted(wanted)} and "
            f"{sorted(there)}."
        )


def _matches(names: ModelNames, path: str, *, parameters: bool) -> list[tuple[str, str, dict[str, str]]]:
    """Return (name, first name, placeholder values) of all that fit a template; placeholders stay within a dot."""
    pieces = _PLACEHOLDER.split(path)
    seen: set[str] = set()
    parts = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            parts.append(re.escape(piece))
        else:
            parts.append(f"(?P={piece})" if piece in seen else f"(?P<{piece}>[^.]+)")
            seen.add(piece)
    pattern = re.compile("".join(parts))
    found = []
    for name, canonical in names.spellings(parameters=parameters):
        if match := pattern.fullmatch(name):
            found.append((name, canonical, match.groupdict()))
    return found


def _fill(template: str, values: dict[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda m: values[m.group(1)], template)
