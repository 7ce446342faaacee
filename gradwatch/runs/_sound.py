"""What is read from JSON, made sure of: whoever wrote it, reading it further raises nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import RunFormatError
from ..records import SEVERITIES, Incident, Index

__all__ = [
    "UNREADABLE",
    "NewerError",
    "is_count",
    "refuse_higher",
    "sound_annotation",
    "sound_incident",
    "sound_index",
    "sound_meta",
]

UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, IndexError)

TEXTS = ("rule", "name", "severity", "first_path", "advice", "message")
COUNTS = ("first_step", "last_step", "count", "id")


class NewerError(RunFormatError):
    """It was written by a gradwatch that knows more."""


def sound_incident(data: Mapping[str, Any]) -> Incident | None:
    """Return the incident of a line; None where it is none."""
    try:
        incident = Incident.from_json(data)
    except UNREADABLE:
        return None
    texts = [getattr(incident, name) for name in TEXTS] + [*incident.paths, *incident.treatments]
    counts = [getattr(incident, name) for name in COUNTS]
    counts += [step for step in (incident.resolved_step, incident.worst_step) if step is not None]
    is_sound = (
        all(isinstance(text, str) for text in texts)
        and all(map(is_count, counts))
        and incident.severity in SEVERITIES
        and isinstance(incident.resolved, bool)
        and isinstance(incident.worst_path, str | None)
        and isinstance(incident.labels, Mapping)
        and isinstance(incident.details, Mapping)
        and is_count(data.get("session", 0))
    )
    return incident if is_sound else None


def sound_annotation(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what rules were told; None where a line says nothing of the kind."""
    closing, silence = data.get("closing", {}), data.get("silence", 0)
    is_sound = (
        is_count(data.get("after_step"))
        and is_count(data.get("session", 0))
        and is_count(silence)
        and isinstance(data.get("text", ""), str)
        and all(_are_patterns(data.get(name, "*")) for name in ("paths", "rules"))
        and isinstance(closing, Mapping)
    )
    if not is_sound:
        return None
    try:
        told = {name: float(value) for name, value in closing.items()}
    except UNREADABLE:
        return None
    return {**data, "closing": told} if "closing" in data else dict(data)


def _are_patterns(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def is_count(value: Any) -> bool:
    """Return whether it is a whole number that fits 64 bits."""
    return type(value) is int and abs(value) < 2**63


def sound_index(data: Any) -> Index:
    """Return the index of a file.

    Raises:
        RunFormatError, or one of `UNREADABLE`: it is none.
    """
    index = Index.from_json(data)
    n = len(index)
    is_sound = (
        all(isinstance(text, str) for text in (*index.paths, *index.kinds, *index.types))
        and all(len(part) == n for part in (index.types, index.in_optimizer, index.trainable))
        and all(np.ndim(part) == 1 for part in (index.numel, index.depth, index.in_optimizer, index.trainable))
        and all(is_count(size) for shape in index.shapes for size in shape)
        and len(index.positions) == n
    )
    if not is_sound:
        raise ValueError("its parts don't fit each other")
    return index


def sound_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return meta.json with what is not as it should be left out."""
    found = dict(meta)
    for name in ("name", "model"):
        if not isinstance(found.get(name, ""), str):
            found[name] = str(found[name])
    for name in ("versions", "options"):
        if not isinstance(found.get(name, {}), Mapping):
            del found[name]
    sessions = found.get("sessions")
    whole = isinstance(sessions, list) and sessions and all(map(_is_session, sessions))
    found["sessions"] = sessions if whole else [_UNTOLD]
    return found


_UNTOLD = {"number": 1, "start_step": 0, "started": None, "finished": None, "is_told": False}
"""What stands for a session of which nothing is on record."""


def _is_session(session: Any) -> bool:
    return (
        isinstance(session, Mapping)
        and is_count(session.get("number"))
        and all(session.get(name) is None or _is_number(session[name]) for name in ("started", "finished"))
        and isinstance(session.get("ended", ""), str)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def refuse_higher(schema: Any, newest: int, where: object) -> None:
    """Raises:
    NewerError: it was written by a gradwatch that knows more.
    RunFormatError: it does not say by which.
    """
    words = f"{where} has schema {schema!r}; this gradwatch reads up to {newest}."
    if not is_count(schema):
        raise RunFormatError(words)
    if schema > newest:
        raise NewerError(f"{words} Update gradwatch to read it.")
