"""The TensorBoard sink."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary

from ...errors import ConfigError, GradwatchError
from ...protocols import RunMeta, Sink
from ...records import Buckets, Incident, StepRecord, Verdict
from .._headline import SCALARS, Headline, whole_window
from .._incident_lines import IncidentKey, incident_key
from .._text import closing_words, fenced, incident_line
from ._descriptions import Descriptions
from ._layout import band_values, layout_value, layouts_in
from ._restart import is_needed, restart
from ._tensors import BUCKETS, PluginTensors
from ._values import histogram, scalar, signed_buckets, text

__all__ = ["TensorBoardSink"]

TITLES = {"log10": "log10 |gradient|", "signed": "gradient"}
"""What the stock dashboard's histograms are of, as their group is called."""


@dataclass
class News:
    """Incidents that changed, the lines that say so, and the step at which they are written."""

    step: int
    incidents: dict[IncidentKey, Incident] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


class TensorBoardSink(Sink):
    """Writes through a `SummaryWriter` that is already open: one packed event a log step.

    `add_scalar` once per tag and `add_histogram` would cost twenty times as much. A writer that can't take packed
    events gets the headline through `add_scalar`, and nothing else.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, such as a Lightning logger's `experiment`. It stays the
            caller's: it is flushed but never closed.
        name: tags begin with it.
        layout: write a layout for the Custom Scalars dashboard, into the run itself; one of the user's own that is
            there already is kept beside it.
        histogram_scale: `"log10"` of the magnitude, or `"signed"` values.
        max_histograms: paths in the stock histogram dashboard at most.
        histograms_apart: steps at least from one set of histograms in the stock dashboard to the next. It shows 51 at
            most, and every byte costs the writer's thread 150 ns; gradwatch's own tab gets all of them.
    """

    every: int | None = None

    def __init__(
        self,
        writer: Any,
        *,
        name: str = "gradwatch",
        layout: bool = True,
        histogram_scale: str = "log10",
        max_histograms: int = 256,
        histograms_apart: int = 10,
    ) -> None:
        if histogram_scale not in ("log10", "signed"):
            raise ConfigError(
                f"TensorBoardSink: `histogram_scale` must be 'log10' or 'signed'. Got {histogram_scale!r}."
            )
        if not max_histograms >= 0:
            raise ConfigError(f"TensorBoardSink: `max_histograms` must be at least 0. Got {max_histograms}.")
        if not histograms_apart >= 1:
            raise ConfigError(f"TensorBoardSink: `histograms_apart` must be at least 1. Got {histograms_apart}.")
        if not hasattr(writer, "add_scalar"):
            raise ConfigError(
                f"TensorBoardSink needs a SummaryWriter (with `add_scalar`). Got {type(writer).__name__}."
            )
        self.writer = writer
        self.name = name
        self.layout = layout
        self._about = Descriptions(name)
        self.histogram_scale = histogram_scale
        self.max_histograms = max_histograms
        self.histograms_apart = histograms_apart
        self._last_histograms = -math.inf
        self._meta: RunMeta | None = None
        self._tensors = PluginTensors(name)
        self._headline = Headline()
        self._packed = True
        self._step = 0
        self._incidents: dict[IncidentKey, Incident] = {}
        self._said = News(step=-1)
        self._unsaid = News(step=-1)
        self._text = ""

    def open(self, meta: RunMeta) -> None:
        """Write the layout of the Custom Scalars dashboard, where there is none yet."""
        if self._meta is not None:
            return
        self._meta, self._step = meta, max(0, meta.start_step)
        if hasattr(self.writer, "_get_file_writer"):
            if self._closed():
                # Lightning's logger closes its writer after each fit, and writes on through it in the next.
                self.writer._get_file_writer()
            if self.layout:
                self._write_layout(str(getattr(self.writer, "log_dir", None) or ""))
            self.resumed(meta.start_step)

    def _write_layout(self, folder: str) -> None:
        self.writer.flush()  # a layout of the user's own may be on its way
        value = layout_value(self.name, layouts_in(folder))
        if value is not None:
            self._add([value], 0, 0.0, {})

    def resumed(self, step: int) -> None:
        """Say that steps from this one on are written again, where they stand in an earlier file of the folder."""
        folder = getattr(self.writer, "log_dir", None)
        if not (folder and step > 0 and hasattr(self.writer, "_get_file_writer")) or self._closed():
            return
        if is_needed(str(folder), self.name, step):
            # TensorBoard's own pages take the first one of a log for its beginning, and forget nothing.
            for _ in range(2):
                self.writer._get_file_writer().add_event(restart(step))

    def write(self, record: StepRecord, window: Sequence[StepRecord] = ()) -> None:
        window = whole_window(record, window)
        self._write_indices(window)
        headline = self._headline.update(window)
        scalars = {f"{self.name}/{k}": headline[k] for k in SCALARS if k in headline}
        tensors = self._tensors
        values = [
            *(scalar(tag, value, self._about.scalar(tag, tag.rpartition("/")[2])) for tag, value in scalars.items()),
            *band_values(self.name, window, self._about),
            tensors.headline(headline),
            *tensors.scalars(window),
            *tensors.treatments(window),
            *tensors.statistics(window),
        ]
        self._step = record.step
        self._add(values + self._incident_values(record.step), record.step, record.time, scalars)
        for each in window:
            if each.histograms:
                self._write_histograms(each)

    def incident(self, incident: Incident) -> None:
        """Keep it for the next event: the data server drops all but the last of several at one step."""
        key = incident_key(incident)
        before = self._incidents.get(key)
        self._headline.incident(incident)
        self._incidents[key] = incident
        self._unsaid.incidents[key] = incident
        self._unsaid.step = max(self._unsaid.step, incident.last_step, incident.resolved_step or 0)
        if before is None or before.resolved != incident.resolved:
            self._unsaid.lines.append(incident_line(incident))

    def summary(self, text: str) -> None:
        """Write the words said at the end into the text dashboard, below a table of the incidents.

        The words are shown as they are, column under column, unless they begin with a heading: then as markdown.
        """
        self._text = text
        if not text.startswith("#"):
            text = fenced(text)
        self._write_text(f"{self.name}/summary", f"{self._closing_words()}\n\n{text}")

    def judged(self, verdict: Verdict, ended: str) -> None:
        """Write what each rule judged, and how the run ended, for the tab."""
        if self._headline.count:
            told = {"coverage": [c.to_json() for c in verdict.coverage], "num_steps": verdict.num_steps, "ended": ended}
            self._add([self._tensors.judged(told)], self._step, 0.0, {})

    def flush(self) -> None:
        if self._unsaid.incidents:
            self._step = max(self._step, self._unsaid.step)
            self._add(self._incident_values(self._step), self._step, 0.0, {})
        if not self._closed():
            self.writer.flush()

    def close(self) -> None:
        """Write what is left and flush; the writer stays open."""
        if self._meta is None:
            return
        if self._headline.count and not self._text and not self._closed():
            self._write_text(f"{self.name}/summary", self._closing_words())
        self.flush()
        self._meta = None

    # Inside

    def _closing_words(self) -> str:
        return closing_words(self._headline, list(self._incidents.values()), self._step)

    def _incident_values(self, step: int) -> list[Any]:
        """Return what is new of incidents; and, where the step was written before, what that event said of them too."""
        if not self._unsaid.incidents:
            return []
        news = self._unsaid
        if step <= self._said.step:
            news = News(step, self._said.incidents | news.incidents, self._said.lines + news.lines)
        news.step = step
        self._said, self._unsaid = news, News(step=-1)
        values = [self._tensors.incidents(list(news.incidents.values()))]
        if not news.lines:
            return values
        tag = f"{self.name}/incident_log"
        return [*values, text(tag, "\n\n".join(news.lines), self._about.text(tag, "incidents, as they begin and end"))]

    def _write_indices(self, window: Sequence[StepRecord]) -> None:
        if self._meta is not None and self._tensors.is_new:
            self._add([self._tensors.meta(self._meta)], window[0].step, window[0].time, {})
        for record in window:
            if (value := self._tensors.index(record.index)) is not None:
                self._add([value], record.step, record.time, {})

    def _write_histograms(self, record: StepRecord) -> None:
        buckets = Buckets.of(record.histograms.values(), BUCKETS)
        values = [self._tensors.histograms(record, buckets)]
        if record.step - self._last_histograms >= self.histograms_apart:
            self._last_histograms = record.step
            values += self._stock_histograms(record, buckets)
        self._add(values, record.step, record.time, {})

    def _stock_histograms(self, record: StepRecord, buckets: Buckets) -> Iterator[Any]:
        for row, (path, counts) in enumerate(islice(record.histograms.items(), self.max_histograms)):
            edges, filled = buckets[row] if self.histogram_scale == "log10" else signed_buckets(counts, BUCKETS)
            if len(filled):
                tag = f"{self.name} {TITLES[self.histogram_scale]}/{path}"
                yield histogram(tag, edges, filled, self._about.histogram(tag, path, self.histogram_scale))

    def _write_text(self, tag: str, markdown: str) -> None:
        about = self._about.text(tag, "what the run came to: a table of the incidents, and the summary")
        self._add([text(tag, markdown, about)], self._step, 0.0, {})

    def _add(self, values: list[Any], step: int, walltime: float, scalars: dict[str, float]) -> None:
        """Add one event; `scalars` are those among the values that a plain writer can take."""
        if self._closed():
            raise GradwatchError("the SummaryWriter was closed; writing on would begin a second event file")
        if self._packed:
            try:
                self.writer._get_file_writer().add_summary(Summary(value=values), step, walltime or None)
                return
            except (AttributeError, TypeError):  # a private name, or another library's protocol buffers
                self._packed = False
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step)

    def _closed(self) -> bool:
        # torch's writer opens a new file when it is used after `close`.
        return getattr(self.writer, "all_writers", self) is None
