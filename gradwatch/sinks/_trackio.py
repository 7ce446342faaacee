"""Trackio: numbers at steps of their own, beside the caller's."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ._duck import DuckSink

__all__ = ["TrackioSink", "is_trackio"]


class TrackioSink(DuckSink):
    """Writes the headline to a run of Trackio, or to the module's current run.

    `run.log(metrics, step=)` moves the run's count of steps: the caller's next `log` without a step would land behind
    ours, 50 steps further on. So the count of our own calls is kept apart.

    Args:
        logger: what `trackio.init()` returned, or the module.
        name: keys begin with it.
    """

    def __init__(self, logger: Any, *, name: str = "gradwatch") -> None:
        super().__init__(logger, name=name)

    def _send(self, named: Mapping[str, float], step: int) -> None:
        run = _run_of(self.logger)
        if run is None:
            self.logger.log(dict(named), step=step)  # the module says what is missing
        else:
            type(run).log(_StepsApart(run), dict(named), step=step)


def is_trackio(logger: Any) -> bool:
    """Return whether it is a run of Trackio, or its module."""
    named = logger.__name__ if isinstance(logger, ModuleType) else type(logger).__module__
    return named.split(".")[0] == "trackio" and callable(getattr(logger, "log", None))


def _run_of(logger: Any) -> Any:
    """Return the run itself; None where the module doesn't tell."""
    if not isinstance(logger, ModuleType):
        return logger
    kept = getattr(getattr(logger, "context_vars", None), "current_run", None)
    return None if kept is None else kept.get()


class _StepsApart:
    """A run of Trackio, whatever is read of it or set on it, but for the step that comes next."""

    def __init__(self, run: Any) -> None:
        object.__setattr__(self, "_apart", {"run": run})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._apart["run"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_next_step":
            object.__setattr__(self, name, value)
        else:
            setattr(self._apart["run"], name, value)
