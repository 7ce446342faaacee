"""The run folder: every record, exactly, on disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError, GradwatchError, RunFormatError
from ..protocols import RunMeta
from ..records import SCHEMA_VERSION, Incident, Index, StepRecord
from ._incident_lines import IncidentLines
from ._lock import FolderLock
from ._plain import dumps, plain
from ._segments import Segments
from .blocks import encode

__all__ = ["RUN_FORMAT", "RunFolder"]

RUN_FORMAT = "gradwatch-run"


class RunFolder:
    """A sink that keeps every record, so that `gradwatch.runs.read_run` gives back exactly what was judged.

    Records are held in memory and written in blocks; what was flushed is readable after SIGKILL. Opening a folder
    that holds a run continues it: records from the step of the first new one on replace the old.

    Args:
        path: the folder; None takes `run_dir` of the meta at `open`.
        limit_mb: bound for the record files. Beyond it the columns of every second record of the oldest files are
            dropped; scalars of every step stay.
        flush_records: write at the latest after so many records,
        flush_seconds: or when a record comes so long after the last write,
        flush_mb: or when so much is held in memory.

    Attributes:
        every: the cadence this sink wants, in steps: each record counts.
        path: the folder, or None before `open`.
    """

    every = 1

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        limit_mb: float = 512.0,
        flush_records: int = 256,
        flush_seconds: float = 10.0,
        flush_mb: float = 4.0,
    ) -> None:
        positive = {
            "limit_mb": limit_mb,
            "flush_records": flush_records,
            "flush_seconds": flush_seconds,
            "flush_mb": flush_mb,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ConfigError(f"RunFolder: `{name}` must be above 0. Got {value}.")
        self.path = Path(path) if path is not None else None
        self._settings = positive
        self._pid = -1
        self._lock: FolderLock | None = None
        self._segments: Segments | None = None
        self._lines: IncidentLines | None = None
        self._reset_buffer()

    def __reduce__(self) -> Any:
        # A copy (an averaged model, a spawned process) is a closed sink: the files stay with the original.
        settings: dict[str, Any] = self._settings
        return partial(type(self), **settings), (self.path,)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    # The Sink protocol

    def open(self, meta: RunMeta) -> None:
        """Begin, or continue, the run in the folder.

        Raises:
            ConfigError: no folder was given, or another sink is writing there.
            RunFormatError: the folder holds something else, or a run of a higher schema.
        """
        if self._segments is not None:
            return
        if self.path is None:
            if meta.run_dir is None:
                raise ConfigError("RunFolder has no path, and the run has no `run_dir`. Give one of them.")
            self.path = Path(meta.run_dir)
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.path)
        lock.acquire()
        try:
            self._begin(self.path, meta)
        except BaseException:
            lock.release()
            raise
        self._lock, self._pid = lock, os.getpid()

    def write(self, record: StepRecord, window: Sequence[StepRecord] = ()) -> None:
        """Keep every record of the window, and `record`, which is its last."""
        self._opened()
        for each in window:
            if each is not record:
                self._keep(each)
        self._keep(record)
        if (
            len(self._buffer) >= self._settings["flush_records"]
            or self._held >= self._settings["flush_mb"] * 2**20
            or time.monotonic() - self._flushed > self._settings["flush_seconds"]
        ):
            self.flush()

    def incident(self, incident: Incident) -> None:
        """Append a line, at once where something new is said of it, else with the next flush."""
        self._opened()
        assert self._lines is not None
        self._lines.add(incident)

    def annotate(self, **annotation: Any) -> None:
        """Append to `annotations.jsonl` what rules were told after the last record: replay tells them too."""
        self._opened()
        assert self.path is not None
        line = {**annotation, "after_step": self._last_step, "session": self._meta["sessions"][-1]["number"]}
        with (self.path / "annotations.jsonl").open("a", encoding="utf-8") as file:
            file.write(dumps(line) + "\n")

    def summary(self, text: str) -> None:
        """Write the words said at the end of a run that came to its end to `summary.md`."""
        self._opened()
        assert self.path is not None
        self._meta["sessions"][-1]["complete"] = True
        (self.path / "summary.md").write_text(text, encoding="utf-8")

    def flush(self) -> None:
        """Write what is held in memory. Does nothing in a forked child, whose memory is a copy."""
        if self._segments is None or self._lines is None or self._pid != os.getpid():
            return
        records, number = self._buffer, self._index_number
        self._reset_buffer()
        self._flushed = time.monotonic()
        if records:
            self._segments.append(encode(records, index=number))
        self._lines.flush()

    def close(self) -> None:
        """Flush and let go of the folder. May be called again, and the sink opened again."""
        if self._segments is None or self._pid != os.getpid():
            return
        try:
            self.flush()
            self._meta["sessions"][-1]["finished"] = time.time()
            self._write_json("meta.json", self._meta)
        finally:
            self._segments = self._lines = None
            if self._lock is not None:
                self._lock.release()

    # Inside

    def _reset_buffer(self) -> None:
        self._buffer: list[StepRecord] = []
        self._held = 0

    def _opened(self) -> None:
        if self._segments is None:
            raise GradwatchError(f"{self!r} is not open: call `open(meta)` first.")

    def _begin(self, path: Path, meta: RunMeta) -> None:
        file = path / "meta.json"
        self._meta: dict[str, Any] = _checked(file) if file.exists() else {}
        sessions = [*self._meta.get("sessions", [])]
        number = 1 + max((int(s["number"]) for s in sessions), default=0)
        started = meta.started or time.time()
        sessions.append({"number": number, "start_step": meta.start_step, "started": started, "finished": None})
        self._meta = {
            "format": RUN_FORMAT,
            "schema": SCHEMA_VERSION,
            "name": meta.name,
            "model": meta.model,
            "started": self._meta.get("started", started),
            "versions": dict(meta.versions),
            "options": plain(dict(meta.options)),
            "limit_mb": self._settings["limit_mb"],
            "sessions": sessions,
        }
        self._write_json("meta.json", self._meta)
        self._last_step = meta.start_step - 1
        self._index: Index | None = None
        self._index_json: dict[str, Any] = {}
        numbers = [p.stem.partition("-")[2] for p in path.glob("index-*.json")]
        self._index_number = max((int(n) for n in numbers if n.isdigit()), default=-1)
        if self._index_number >= 0:
            self._index_json = json.loads((path / f"index-{self._index_number:03d}.json").read_text(encoding="utf-8"))
        self._reset_buffer()
        self._flushed = float("-inf")
        self._lines = IncidentLines(path / "incidents.jsonl", session=number)
        limit = int(self._settings["limit_mb"] * 2**20)
        self._segments = Segments(path, session=number, limit_bytes=limit)

    def _keep(self, record: StepRecord) -> None:
        if record.index is not self._index:
            self._change_index(record.index)
        self._buffer.append(record)
        self._last_step = record.step
        self._held += 8 * len(record.index) * (len(record.columns) + 64 * bool(record.histograms))

    def _change_index(self, index: Index) -> None:
        data = {"schema": SCHEMA_VERSION, **index.to_json()}
        if data != self._index_json:
            if self._buffer:
                self.flush()
            self._index_number += 1
            self._index_json = data
            self._write_json(f"index-{self._index_number:03d}.json", data)
        self._index = index

    def _write_json(self, name: str, data: Any) -> None:
        assert self.path is not None
        temporary = self.path / (name + ".tmp")
        temporary.write_text(dumps(data), encoding="utf-8")
        temporary.replace(self.path / name)


def _checked(file: Path) -> dict[str, Any]:
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        form, schema = meta["format"], int(meta["schema"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunFormatError(f"{file} is not a gradwatch run's ({error!r}). Use another folder.") from None
    if form != RUN_FORMAT or schema > SCHEMA_VERSION:
        raise RunFormatError(
            f"{file} is of format {form!r}, schema {schema}; this gradwatch continues {RUN_FORMAT!r} up to schema "
            f"{SCHEMA_VERSION}. Use another folder, or update gradwatch."
        )
    return dict(meta)
