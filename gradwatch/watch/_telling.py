"""Calling someone with an incident, in the training's own time: never for longer than a few seconds in all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from .._warn import one_line
from ..records import Incident

__all__ = ["Telling"]

PATIENCE = 5.0
"""Seconds that a function may take before the training goes on without it."""


class Telling:
    """Runs users' functions in a thread each, and waits for it as long as anyone can expect to be waited for.

    One that does not come back is told once, and not called again until it has.
    """

    def __init__(self, *, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._hanging: dict[int, threading.Thread] = {}

    def tell(self, target: Callable[[Incident], Any], incident: Incident) -> None:
        """Call the function.

        Raises:
            TimeoutError: it has not come back; of one that hangs already there is no word more.
            Exception: what the function raised.
        """
        before = self._hanging.get(id(target))
        if before is not None and before.is_alive():
            return
        raised: list[BaseException] = []

        def call() -> None:
            try:
                target(incident)
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=call, name="gradwatch-tell", daemon=True)
        thread.start()
        thread.join(self._patience)
        if thread.is_alive():
            self._hanging[id(target)] = thread
            raise TimeoutError(f"{one_line(repr(target))} has not come back in {self._patience:g} s")
        if raised:
            raise raised[0]
