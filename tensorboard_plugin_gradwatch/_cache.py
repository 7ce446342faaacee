"""What was decoded, kept for the next question."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

__all__ = ["Cache"]


class Cache:
    """Keeps what was made as long as what it was made of has not changed, up to a number of bytes."""

    def __init__(self, limit_bytes: int = 256 << 20) -> None:
        self._limit = limit_bytes
        self._held: OrderedDict[tuple[Any, ...], tuple[tuple[Any, ...], Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[Any, ...], stamp: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Return what was made for this key and stamp, making it now where it is new."""
        with self._lock:
            held = self._held.get(key)
            if held is not None and held[0] == stamp:
                self._held.move_to_end(key)
                return held[1]
        made = make()
        with self._lock:
            self._held[key] = (stamp, made, getattr(made, "nbytes", 1 << 16))
            self._held.move_to_end(key)
            while len(self._held) > 1 and sum(h[2] for h in self._held.values()) > self._limit:
                self._held.popitem(last=False)
        return made
