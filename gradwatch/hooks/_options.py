"""How a hook behaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from ..errors import ConfigError, UnknownNameError
from ._points import Point

__all__ = ["POLICIES", "HookOptions"]

POLICIES = ("raise", "disable", "close", "warn")


@dataclass(frozen=True, kw_only=True)
class HookOptions:
    """How a hook behaves. See `HookManager.add`."""

    priority: int = 0
    prepend: bool = False
    permanent: bool = False
    every: int = 1
    when: Callable[[Point], Any] | None = None
    once: bool = False
    on_error: str = "raise"
    raw: bool = False
    recompute: bool | None = None
    leaf: str | None = None

    @classmethod
    def refuse_unknown(cls, given: Iterable[str]) -> None:
        """Raise where a hook has no such option.

        Raises:
            UnknownNameError: with the options that it has.
        """
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise UnknownNameError("option of a hook", name, known)

    def __post_init__(self) -> None:
        if not (isinstance(self.every, int) and self.every >= 1):
            raise ConfigError(f"`every` is a whole number of steps from 1 up. Got {self.every!r}.")
        if not math.isfinite(self.priority):
            raise ConfigError(f"`priority` is a finite number; the highest runs first. Got {self.priority!r}.")
        if self.on_error not in POLICIES:
            raise ConfigError(f"`on_error` is one of {', '.join(map(repr, POLICIES))}. Got {self.on_error!r}.")
        if self.when is not None and not callable(self.when):
            raise ConfigError(f"`when` is a function of the point. Got {self.when!r}.")
