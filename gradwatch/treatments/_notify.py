"""Telling someone outside of the training."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any
from urllib.request import Request, urlopen

from ..errors import ConfigError, GradwatchWarning
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
        self.url = url
        self.timeout = timeout

    def __repr__(self) -> str:
        return f"Webhook({self.url!r})"

    def __call__(self, incident: Incident) -> threading.Thread:
        body = json.dumps({"text": str(incident), "incident": incident.to_json()}).encode()
        thread = threading.Thread(target=self._post, args=(body,), name="gradwatch-notify", daemon=True)
        thread.start()
        return thread

    def _post(self, body: bytes) -> None:
        request = Request(self.url, data=body, headers={"Content-Type": "application/json"}, method="POST")
        try:
            with urlopen(request, timeout=self.timeout):
                pass
        except (OSError, ValueError) as error:
            _warn(f"Notify: {self.url} could not be told: {error}")


def send(target: Callable[[Incident], Any], incident: Incident) -> None:
    """Call the target of a "notify" request; what it raises becomes a warning: telling must not end a training."""
    try:
        target(incident)
    except Exception as error:
        _warn(f"Notify: {target!r} raised {type(error).__name__}: {error}")


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
        return Webhook(target)
    if isinstance(target, str) and ":" in target:
        module, _, function_name = target.partition(":")
        try:
            function = getattr(import_module(module), function_name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{door}: {target!r} can't be imported: {error}") from error
        if callable(function):
            return function
    raise ConfigError(f"{door}: `{name}` must be a callable, an http(s) address or 'module:function'. Got {target!r}.")


def _warn(message: str) -> None:
    try:
        warnings.warn(message, GradwatchWarning, stacklevel=3)
    except GradwatchWarning:
        # Warnings are errors here: in a thread of its own nobody could catch it.
        if threading.current_thread().name != "gradwatch-notify":
            raise
