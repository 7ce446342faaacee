"""Telling someone outside of the training."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

from .._address import checked_address, host_of, post
from .._warn import one_line, warn
from ..errors import ConfigError
from ..records import Incident

__all__ = ["Webhook", "resolve_target", "send"]


class Webhook:
    """Sends an incident to an address as JSON: `text` (one line, as chat services expect) and `incident`.

    Sending happens in a thread of its own, so that a slow server does not hold up a step; a failure is one warning.

    Args:
        url: beginning with http:// or https://.
        timeout: seconds.
    """

    def __init__(self, url: str, *, timeout: float = 10.0) -> None:
        self.url = checked_address(url, where="Webhook")
        self.timeout = timeout
        self._has_complained = False

    def __repr__(self) -> str:
        return f"Webhook to {host_of(self.url)}"

    def __call__(self, incident: Incident) -> threading.Thread:
        body = json.dumps({"text": str(incident), "incident": incident.to_json()}).encode()
        thread = threading.Thread(target=self._post, args=(body,), name="gradwatch-notify", daemon=True)
        thread.start()
        return thread

    def _post(self, body: bytes) -> None:
        try:
            post(self.url, body, timeout=self.timeout)
        except (OSError, ValueError) as error:
            if not self._has_complained:
                self._has_complained = True
                warn(f"Notify: {host_of(self.url)} could not be told: {one_line(error)}. Said once.")


def send(target: Callable[[Incident], Any], incident: Incident) -> None:
    """Call the target of a "notify" request; what it raises becomes a warning: telling must not end a training."""
    try:
        target(incident)
    except Exception as error:
        warn(f"Notify: {one_line(repr(target))} raised {one_line(error)}")


def resolve_target(target: Any, *, door: str = "Notify", name: str = "target") -> Callable[[Incident], Any]:
    """Return the function behind a callable, an http(s) address or `"module:function"`.

    Args:
        target: one of these.
        door, name: what the error speaks of: the setting `name` of `door`.

    Raises:
        ConfigError: it is none of these.
    """
    if callable(target):
        return target
    if isinstance(target, str) and target.startswith(("http://", "https://")):
        return Webhook(checked_address(target, where=f"{door}: `{name}`"))
    if isinstance(target, str) and ":" in target:
        module, _, function_name = target.partition(":")
        try:
            function = getattr(import_module(module), function_name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{door}: {target!r} can't be imported: {error}") from error
        if callable(function):
            return function
    raise ConfigError(f"{door}: `{name}` must be a callable, an http(s) address or 'module:function'. Got {target!r}.")
