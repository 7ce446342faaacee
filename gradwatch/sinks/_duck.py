"""Any logger that takes metrics by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..records import StepRecord
from ._headline import SCALARS
from ._scalars import ScalarSink

__all__ = ["DuckSink", "is_logger"]

METHODS = ("log_metrics", "log_metric", "track", "log")


class DuckSink(ScalarSink):
    """Writes the headline to an object with `log_metrics(dict, step=)`, `log_metric(name, value, step=)`,
    `track(value, name=, step=)` or `log(dict, step=)`, the first of these that it has.

    So do Lightning's loggers, Comet's experiments, a run of Aim, and many others.

    Args:
        logger: the object.
        name: keys begin with it.
        fixed_keys: give every key at each step, nan where there is nothing: for loggers to which a new key is dear
            (Lightning's CSVLogger rewrites its file).

    Raises:
        ConfigError: it has none of them.
    """

    def __init__(self, logger: Any, *, name: str = "gradwatch", fixed_keys: bool = False) -> None:
        super().__init__(name=name)
        if not is_logger(logger):
            known = ", ".join(f"`{method}`" for method in METHODS)
            raise ConfigError(f"{type(logger).__name__} has none of {known} that takes a `step`: it is no logger.")
        self.logger = logger
        self.fixed_keys = fixed_keys

    def _log(self, values: Mapping[str, float], record: StepRecord, window: Sequence[StepRecord]) -> None:
        if self.fixed_keys:
            values = {key: values.get(key, np.nan) for key in SCALARS}
        named = {self._key(key): float(value) for key, value in values.items()}
        self._send(named, record.step)

    def _send(self, named: Mapping[str, float], step: int) -> None:
        logger = self.logger
        match _method(logger):
            case "log_metrics":
                logger.log_metrics(named, step=step)
            case "log_metric":
                for key, value in named.items():
                    logger.log_metric(key, value, step=step)
            case "track":
                for key, value in named.items():
                    logger.track(value, name=key, step=step)
            case "log":
                logger.log(named, step=step)

    def flush(self) -> None:
        # Lightning's loggers keep what was not saved in memory.
        save: Callable[[], Any] | None = getattr(self.logger, "save", None)
        if callable(save) and callable(getattr(self.logger, "finalize", None)):
            save()


def is_logger(logger: Any) -> bool:
    """Return whether a `DuckSink` can write to an object."""
    return _method(logger) is not None


def _method(logger: Any) -> str | None:
    """Return the first of `METHODS` that an object has; `track` and `log` mean other things elsewhere, and must name a
    step among what they take."""
    for method in METHODS:
        found = getattr(logger, method, None)
        if callable(found) and (method.startswith("log_") or _takes_step(found)):
            return method
    return None


def _takes_step(method: Callable[..., Any]) -> bool:
    try:
        return "step" in inspect.signature(method).parameters
    except (TypeError, ValueError):  # written in C
        return False
