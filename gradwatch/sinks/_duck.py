"""Any logger that takes metrics by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..records import StepRecord
from ._headline import SCALARS
from ._scalars import ScalarSink

__all__ = ["DuckSink"]


class DuckSink(ScalarSink):
    """Writes the headline to an object with `log_metrics(dict, step=)` or `log_metric(name, value, step=)`.

    So do Lightning's loggers, Comet's experiments, and many others.

    Args:
        logger: the object.
        name: keys begin with it.
        fixed_keys: give every key at each step, nan where there is nothing: for loggers to which a new key is dear
            (Lightning's CSVLogger rewrites its file).
    """

    def __init__(self, logger: Any, *, name: str = "gradwatch", fixed_keys: bool = False) -> None:
        super().__init__(name=name)
        if not any(callable(getattr(logger, method, None)) for method in ("log_metrics", "log_metric")):
            raise ConfigError(f"{type(logger).__name__} has neither `log_metrics` nor `log_metric`: it is no logger.")
        self.logger = logger
        self.fixed_keys = fixed_keys

    def _log(self, values: Mapping[str, float], record: StepRecord, window: Sequence[StepRecord]) -> None:
        if self.fixed_keys:
            values = {key: values.get(key, np.nan) for key in SCALARS}
        named = {self._key(key): float(value) for key, value in values.items()}
        if callable(getattr(self.logger, "log_metrics", None)):
            self.logger.log_metrics(named, step=record.step)
            return
        for key, value in named.items():
            self.logger.log_metric(key, value, step=record.step)

    def flush(self) -> None:
        # Lightning's loggers keep what was not saved in memory.
        save: Callable[[], Any] | None = getattr(self.logger, "save", None)
        if callable(save) and callable(getattr(self.logger, "finalize", None)):
            save()
