"""What sinks for loggers of plain scalars share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..protocols import RunMeta, Sink
from ..records import Incident, StepRecord
from ._headline import SCALARS, Headline, whole_window

__all__ = ["ScalarSink"]


class ScalarSink(Sink):
    """Reduces each logging window to the headline: at most twelve numbers, whatever the model.

    Args:
        name: keys begin with it; "" for bare keys.
    """

    every: int | None = None

    def __init__(self, *, name: str = "gradwatch") -> None:
        self.name = name
        self._headline = Headline()

    def open(self, meta: RunMeta) -> None:
        """The logger is open already."""

    def write(self, record: StepRecord, window: Sequence[StepRecord] = ()) -> None:
        window = whole_window(record, window)
        values = self._headline.update(window)
        self._log({k: values[k] for k in SCALARS if k in values}, record, window)

    def incident(self, incident: Incident) -> None:
        self._headline.incident(incident)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """The logger stays its owner's."""

    def _key(self, key: str) -> str:
        return f"{self.name}/{key}" if self.name else key

    def _log(self, values: Mapping[str, float], record: StepRecord, window: Sequence[StepRecord]) -> None:
        raise NotImplementedError
