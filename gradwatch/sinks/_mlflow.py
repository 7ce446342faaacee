"""MLflow."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from time import time
from typing import Any

from ..errors import ConfigError
from ..records import StepRecord
from ._scalars import ScalarSink

__all__ = ["MlflowSink"]


class MlflowSink(ScalarSink):
    """Writes the headline to a run of MLflow, in one call a log step: a metric takes it most of a millisecond.

    Args:
        client: an `mlflow.MlflowClient`, such as a Lightning MLFlowLogger's `experiment`.
        run_id: of the run.
        name: keys begin with it.
    """

    def __init__(self, client: Any, run_id: str, *, name: str = "gradwatch") -> None:
        super().__init__(name=name)
        if not callable(getattr(client, "log_batch", None)):
            raise ConfigError(f"MlflowSink needs a client with `log_batch`. Got {type(client).__name__}.")
        self.client = client
        self.run_id = run_id

    def report(self, path: str | os.PathLike[str]) -> None:
        """Keep a file, such as the HTML report, as an artifact of the run."""
        self.client.log_artifact(self.run_id, os.fspath(path))

    def _log(self, values: Mapping[str, float], record: StepRecord, window: Sequence[StepRecord]) -> None:
        from mlflow.entities import Metric

        milliseconds = int((record.time or time()) * 1000)
        metrics = [Metric(self._key(k), v, milliseconds, record.step) for k, v in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)
