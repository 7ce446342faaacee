"""Who is told of incidents: what `on_incident` takes, checked at the door, and the sink that does the telling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from .._address import checked_address
from ..records import Incident
from ..sinks import NotifySink
from ..treatments import resolve_target

__all__ = ["IncidentTarget", "incident_target", "incident_sink"]

IncidentTarget: TypeAlias = Callable[[Incident], Any] | str


def incident_target(given: IncidentTarget | None) -> IncidentTarget | None:
    """Return the callable behind `"module:function"`; callables, http(s) addresses and None as they are.

    Raises:
        ConfigError: it is none of these.
    """
    if given is None:
        return given
    if isinstance(given, str) and given.startswith(("http:", "https:")):
        return checked_address(given, where="gradwatch: `on_incident`")
    return resolve_target(given, door="gradwatch", name="on_incident")


def incident_sink(target: IncidentTarget) -> NotifySink:
    """Return the sink that tells a target of incidents, from a thread of its own, however slow the target is.

    A callable hears of every incident when it opens and when it is over; an address of those that are at least
    warnings, when they open, at most ten a minute.
    """
    if callable(target):
        return NotifySink(target, severity="info", resolved=True, max_per_minute=600, queue_size=1000)
    return NotifySink(target)
