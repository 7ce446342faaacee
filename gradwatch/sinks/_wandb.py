"""Weights & Biases."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from ..errors import ConfigError
from ..protocols import RunMeta
from ..records import Incident, StepRecord
from ._incident_lines import IncidentKey, incident_key
from ._scalars import ScalarSink

__all__ = ["WandbSink"]

LEVELS = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}


class WandbSink(ScalarSink):
    """Writes scalars, histograms from gradwatch's own bins, alerts and the report to a run of Weights & Biases.

    Args:
        run: what `wandb.init()` returned, or a Lightning WandbLogger's `experiment`.
        name: keys begin with it.
        step_key: the key that carries the step; the default is the one that Lightning's logger uses. W&B's own step
            counts calls, and must not be given where another logger counts, too.
        max_histograms: paths at most; 0: none.
        alerts: whether incidents of severity warning and above become alerts.
    """

    def __init__(
        self,
        run: Any,
        *,
        name: str = "gradwatch",
        step_key: str = "trainer/global_step",
        max_histograms: int = 64,
        alerts: bool = True,
    ) -> None:
        super().__init__(name=name)
        if not callable(getattr(run, "log", None)):
            raise ConfigError(f"WandbSink needs a run with `log`, as wandb.init() returns. Got {type(run).__name__}.")
        if not max_histograms >= 0:
            raise ConfigError(f"WandbSink: `max_histograms` must be at least 0. Got {max_histograms}.")
        self.run = run
        self.step_key = step_key
        self.max_histograms = max_histograms
        self.alerts = alerts
        self._alerted: set[IncidentKey] = set()

    def open(self, meta: RunMeta) -> None:
        """Say over which key the charts run."""
        if callable(getattr(self.run, "define_metric", None)):
            self.run.define_metric(self._key("*"), step_metric=self.step_key)

    def incident(self, incident: Incident) -> None:
        super().incident(incident)
        key = incident_key(incident)
        wanted = self.alerts and incident.severity in ("warning", "critical") and key not in self._alerted
        if wanted and callable(getattr(self.run, "alert", None)):
            self._alerted.add(key)
            text = f"{incident}\n\n{incident.advice}".strip()
            self.run.alert(title=f"{incident.name or incident.rule}", text=text, level=LEVELS[incident.severity])

    def report(self, path: str | os.PathLike[str]) -> None:
        """Keep a file, such as the HTML report, as an artifact of the run."""
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{self.name}-report")
        self.run.log_artifact(os.fspath(path), name=name, type="report")

    def _log(self, values: Mapping[str, float], record: StepRecord, window: Sequence[StepRecord]) -> None:
        for each in window:
            if each.histograms and self.max_histograms:
                self.run.log({**self._histograms(each), self.step_key: each.step})
        self.run.log({**{self._key(k): v for k, v in values.items()}, self.step_key: record.step})

    def _histograms(self, record: StepRecord) -> dict[str, Any]:
        from wandb import Histogram

        found = {}
        for path, counts in islice(record.histograms.items(), self.max_histograms):
            edges, filled = counts.log10_buckets()
            if len(filled):
                histogram = Histogram(np_histogram=(filled.tolist(), edges.tolist()))
                found[self._key(f"histograms/{path}")] = histogram
        return found
