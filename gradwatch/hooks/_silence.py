"""No silent nothing: what was asked for in a run and did not happen there is an error, with the reason."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import torch
from torch import nn

from .._warn import warn
from ..errors import ConfigError, HookNeverFired, UnknownNameError, suggest
from ._coverage import compiled_parts, why_not
from ._hook import Entry, Hook
from ._patterns import ALL_PORTS
from ._points import READ_AT, HookPoint

if TYPE_CHECKING:
    from ._manager import HookManager

__all__ = ["check_fired", "check_missing", "model_kwargs_of", "parts_of"]

_MISSING = ("raise", "ignore")
_ASKED_FOR = ("condition", "disabled")
"""Reasons that the user gave: a hook that its own `when` or `disable()` keeps quiet is no surprise."""

_ELSEWHERE = {
    "fwd_hooks": "hooks=",
    "hook": "hooks=",
    "forward_hooks": "hooks=",
    "interventions": "hooks=",
    "bwd_hooks": "hooks=[(name + ':grad_output', fn)]",
    "names_filter": "points=",
    "point": "points=",
    "names": "points=",
    "incl_bwd": "gradients=",
    "grad": "gradients=",
    "stop": "stop_at=",
}


def check_missing(missing: str) -> None:
    if missing not in _MISSING:
        raise UnknownNameError("way to treat what never fired", missing, _MISSING, where="missing")


def parts_of(points: Any) -> list[Any]:
    """Return what a user points at, each name, pattern, module or predicate for itself."""
    if isinstance(points, tuple) and len(points) == 2 and points[1] in ALL_PORTS:
        return [(part, points[1]) for part in parts_of(points[0])]
    alone = isinstance(points, (str, type, nn.Module, nn.Parameter)) or callable(points)
    if alone or not isinstance(points, Iterable):
        return [points]
    return [part for inner in points for part in parts_of(inner)]


def check_fired(
    manager: HookManager, asked: Sequence[tuple[Any, Hook]], *, missing: str = "raise", stop_at: Any = None
) -> dict[str, str]:
    """See that of every part of what was asked for something fired in the run that is over; a gradient may still come.

    Args:
        manager: of the hooks.
        asked: (points, hook) of the run, the hooks still in place.
        missing: "raise", or "ignore": what never fired is returned only.
        stop_at: where the run ended early, if it did.

    Returns:
        Points that never fired, with the reason.

    Raises:
        HookNeverFired: of a part nothing fired.
    """
    quiet = {hook: [e for e in hook.entries if not _has_acted(e)] for _, hook in asked}
    if not any(quiet.values()):
        return {}
    compiled = compiled_parts(manager.model)
    found: dict[str, str] = {}
    compiled_away: list[str] = []
    for points, hook in asked:
        reasons = {id(e): _reason(manager, hook, e, compiled, stop_at) for e in quiet[hook]}
        if missing == "raise" and reasons:
            _raise_for_parts(manager, points, hook, reasons)
        for entry in quiet[hook]:
            kind, reason = reasons[id(entry)]
            found[entry.spot.name] = reason
            if kind == "compiled away":
                compiled_away.append(entry.spot.name)
    if compiled_away:
        warn(
            f"{len(compiled_away)} hook points of {type(manager.model).__name__} are compiled away and did not fire, "
            f"{compiled_away[0]!r} among them: add hooks before the first compiled run, hook the uncompiled model, or "
            "call torch.compiler.reset().",
            stacklevel=4,
        )
    return found


def _raise_for_parts(manager: HookManager, points: Any, hook: Hook, reasons: Mapping[int, tuple[str, str]]) -> None:
    for part in parts_of(points):
        places = {_place(p) for p in manager._resolver.resolve(part)}
        entries = [e for e in hook.entries if _place(e.spot) in places]
        if any(id(e) not in reasons for e in entries):
            continue
        if not entries:
            continue
        kind, reason = reasons[id(entries[0])]
        if kind not in _ASKED_FOR:
            name = entries[0].spot.name if len(entries) == 1 or not isinstance(part, str) else part
            raise HookNeverFired(hook.id, str(name), kind, reason)


def _has_acted(entry: Entry) -> bool:
    """Return whether the hook fired or, of a gradient, has been placed in the graph (or will be, at recomputation)."""
    hangs = entry.spot.port == "grad_input" and entry.seen and torch.is_grad_enabled()
    return bool(entry.fired or entry.placed or entry.shaded or hangs)


def _reason(manager: HookManager, hook: Hook, entry: Entry, compiled: list[str], stop_at: Any) -> tuple[str, str]:
    kind, reason = why_not(manager, hook, entry, compiled)
    if kind == "never called" and stop_at is not None:
        return kind, f"the run ended at stop_at={stop_at!r} before it"
    if kind == "never called" and hook.thread is not None and manager._runs.threaded:
        return kind, f"{reason}, in this thread; hooks for every thread: temporary(..., every_thread=True)"
    return kind, reason


def model_kwargs_of(
    manager: HookManager, method: str, kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the keyword arguments for the model: those that its forward names, and all of `model_kwargs`.

    Raises:
        ConfigError: one that neither the method nor the model's forward names: it would vanish in `**kwargs`.
    """
    known = _accepted(manager.model) if kwargs else None
    for name in kwargs:
        if known is None or name in known or _is_setting(manager.model, name):
            continue
        own = [n for n in inspect.signature(getattr(type(manager), method)).parameters if n not in ("self", "kwargs")]
        elsewhere = next((_ELSEWHERE[known] for known in get_close_matches(name, _ELSEWHERE, 1, 0.8)), None)
        hint = f"Did you mean {elsewhere!r}?" if elsewhere else suggest(name, [f"{n}=" for n in own])
        raise ConfigError(
            f"{method} has no keyword {name!r}, and {type(manager.model).__name__}.forward names none either: it would "
            f"vanish there. {hint}{' ' if hint else ''}To hand it to the model: model_kwargs={{{name!r}: ...}}."
        )
    return {**kwargs, **(model_kwargs or {})}


def _accepted(model: nn.Module) -> set[str] | None:
    """Return the keywords that the model's forward names, or that of a part it hands its own on to; None: unknown."""
    found: set[str] = set()
    for number, module in enumerate(model.modules()):
        try:
            parameters = inspect.signature(module.forward).parameters.values()
        except (TypeError, ValueError):
            if number == 0:
                return None
            continue
        named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        named |= _read_by_wrappers(module.forward)
        found |= named
        rest = [p for p in parameters if p.kind is p.VAR_KEYWORD]
        if number == 0 and not rest:
            return named
        found |= {name for p in rest for name in _typed_keywords(p.annotation, module)}
    return found


def _read_by_wrappers(forward: Any) -> set[str]:
    """Return the names that decorators around a forward know: keywords they take for themselves, or hand on under
    another name (a deprecated one)."""
    found: set[str] = set()
    function = getattr(forward, "__func__", forward)
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        code = getattr(function, "__code__", None)
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_set(cell)]
        for known in (*cells, *getattr(code, "co_consts", ())):
            found.update(
                name for name in (known if isinstance(known, (tuple, list)) else (known,)) if type(name) is str
            )
        function = inner
    return found


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty one raises
    except ValueError:
        return False
    return True


def _typed_keywords(annotation: Any, module: nn.Module) -> set[str]:
    """Return the keys of `**kwargs: Unpack[SomeTypedDict]`."""
    if isinstance(annotation, str):
        try:
            annotation = get_type_hints(module.forward).get("kwargs")
        except Exception:
            return set()
    return {name for kind in get_args(annotation) for name in getattr(kind, "__annotations__", {})}


def _is_setting(model: nn.Module, name: str) -> bool:
    """Return whether it is one that a Hugging Face model takes at its call in place of its configuration's."""
    config = getattr(model, "config", None)
    return config is not None and not isinstance(config, Mapping) and hasattr(config, name)


def _place(point: HookPoint) -> tuple[str, str]:
    """Return where a point is read in forward: a cache asked for gradients watches outputs."""
    return point.path, READ_AT.get(point.port, point.port)
