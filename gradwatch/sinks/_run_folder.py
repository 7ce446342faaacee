"""The run folder: every record, exactly, on disk."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import time
from typing import Any

from .._closing import end_all
from .._places import anchored
from .._warn import warn
from ..errors import ConfigError, GradwatchError, RunFormatError
from ..protocols import RunMeta, Sink
from ..records import CaseFile, Incident, StepRecord, Verdict
from ._buffer import Held
from ._case_names import case_name
from ._files import contents, own_files, refuse_links, replace_whole
from ._lock import FolderLock
from ._plain import plain, sealed
from ._recorder import Recorder
from ._signals import off_termination, on_termination
from ._text import fenced
from .blocks import FOLDER_SCHEMA, Block, encode

__all__ = ["RUN_FORMAT", "RunFolder"]

RUN_FORMAT = "gradwatch-run"


class RunFolder(Sink):
    """A sink that keeps every record, so that `gradwatch.runs.read_run` gives back exactly what was judged.

    A record stands in the journal as soon as its step is over, and is readable from there after SIGKILL; a thread
    folds the journal into blocks. What can't be written is held in memory and tried again; what had to be let go is
    counted and told. Opening a folder that holds a run continues it: records from the step of the first new one on
    replace the old.

    Args:
        path: the folder; None takes `run_dir` of the meta at `open`.
        limit_mb: bound for the record files; from 16 MB on they also take no more than 6 KB a step. Beyond it the
            columns of every second record of the oldest files are dropped, about incidents last; scalars of every step
            stay.
        flush_records: write a block at the latest after so many records,
        flush_seconds: or when a record comes so long after the last block,
        flush_mb: or when so much is held in memory.
        buffer_mb: what is held in memory while the disk takes nothing. Beyond it columns are dropped, then the oldest
            records.

    Attributes:
        every: the cadence this sink wants, in steps: each record counts.
        path: the folder, or None before `open`.
    """

    every = 1
    never_hangs = True

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        limit_mb: float = 512.0,
        flush_records: int = 256,
        flush_seconds: float = 10.0,
        flush_mb: float = 4.0,
        buffer_mb: float = 64.0,
    ) -> None:
        positive = {
            "limit_mb": limit_mb,
            "flush_records": flush_records,
            "flush_seconds": flush_seconds,
            "flush_mb": flush_mb,
            "buffer_mb": buffer_mb,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ConfigError(f"RunFolder: `{name}` must be above 0. Got {value}.")
        self.path = anchored(path) if path is not None else None
        self._settings = positive
        self._pid = -1
        self._meta: dict[str, Any] = {}
        self._lock: FolderLock | None = None
        self._has_ended = False
        self._recorder: Recorder | None = None

    @property
    def trouble(self) -> str:
        if self._recorder is not None:
            return self._recorder.in_trouble
        sessions = self._meta.get("sessions") or [{}]
        return str(sessions[-1].get("failed") or "")

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
            RunFormatError: the folder holds something else, a run of a higher schema, or links.
        """
        if self._recorder is not None:
            return
        if self.path is None:
            if meta.run_dir is None:
                raise ConfigError("RunFolder has no path, and the run has no `run_dir`. Give one of them.")
            self.path = anchored(meta.run_dir)
        self.path.mkdir(parents=True, exist_ok=True)
        refuse_links(self.path)
        lock = FolderLock(self.path)
        lock.acquire()
        try:
            self._recorder = self._begin(self.path, meta, lock)
        except BaseException:
            lock.release()
            raise
        self._lock, self._pid, self._has_ended = lock, os.getpid(), False
        on_termination(self)

    def arrived(self, record: StepRecord) -> None:
        """Keep a record whose numbers are there, before it is judged: `write` hands the same one over again."""
        if self._is_mine:
            self._opened().keep(record, is_early=True)

    def write(self, record: StepRecord, window: Sequence[StepRecord] = ()) -> None:
        """Keep every record of the window, and `record`, which is its last."""
        recorder = self._opened()
        if not self._is_mine:
            return
        for each in window:
            if each is not record:
                recorder.keep(each)
        recorder.keep(record)
        self._tell()

    def incident(self, incident: Incident) -> None:
        """Append a line, at once where something new is said of it, else with the next flush."""
        recorder = self._opened()
        if self._is_mine:
            recorder.incident(incident)
            self._tell()

    def case(self, case: CaseFile, batch: bytes | None = None) -> None:
        """Write a case file, and the batch of its name beside it; no batch while the disk takes nothing."""
        recorder = self._opened()
        if not self._is_mine:
            return
        recorder.put(case_name(case), sealed(case.to_json()))
        if batch is not None and not recorder.in_trouble:
            recorder.put(case.batch_file, batch)
        self._tell()

    def annotate(self, **annotation: Any) -> None:
        """Append to `annotations.jsonl` what rules were told after the last record: replay tells them too."""
        recorder = self._opened()
        if self._is_mine:
            recorder.annotate({**annotation, "after_step": self._last_step, "session": self._session["number"]})

    def judged(self, verdict: Verdict, ended: str) -> None:
        """Append what each rule judged, beside what rules were told: readers come to the same verdict."""
        if self._recorder is not None:  # else it was written before Ctrl-C fell into what came after
            self.annotate(judged=[entry.to_json() for entry in verdict.coverage])

    def summary(self, text: str) -> None:
        """Write the words said at the end of a run that came to its end to `summary.md`, as a block of code."""
        text = fenced(text)
        recorder = self._opened()
        self._session |= {"complete": True, "summary": zlib.crc32(text.encode())}
        if self._is_mine:
            recorder.put("summary.md", text)

    def ended(self, why: str) -> None:
        """Note how a run ended that did not come to its end: `"interrupted"`, `"crashed: ..."`."""
        if self._recorder is None:
            return
        self._session |= {"ended": why, "ended_at": self._last_step + 1}

    def missed(self, count: int, why: str) -> None:
        """Put on record that records were let go before they came here."""
        if count and self._recorder is not None and self._is_mine:
            self._recorder.miss(count, why)

    def flush(self) -> None:
        """Write what is held in memory. Does nothing in a forked child, whose memory is a copy."""
        if self._recorder is not None and self._is_mine:
            self._recorder.flush()
            self._tell()

    def close(self) -> None:
        """Flush and let go of the folder. May be called again, and the sink opened again."""
        if self._recorder is None or not self._is_mine:
            return
        # Twice: what Ctrl-C falls into, or keeps from beginning, is made good.
        end_all(self._end, self._end, self._let_go, self._let_go)

    def at_exit(self) -> None:
        """Write what is left of a run that nobody closed, as the interpreter ends."""
        if self._recorder is not None and self._is_mine:
            if not self._session.get("complete"):
                self._session.setdefault("ended", "not closed: the program ended")
                self._session.setdefault("ended_at", self._last_step + 1)
            self.close()

    def terminated(self) -> None:
        """Save what there is as SIGTERM comes: the process may have no time for more."""
        if self._recorder is not None and self._is_mine:
            session = {"ended": "terminated (SIGTERM)", "ended_at": self._last_step + 1}
            sessions = [*self._meta["sessions"][:-1], {**self._session, **session}]
            self._recorder.save("meta.json", sealed({**self._meta, "sessions": sessions}))

    # Inside

    @property
    def _is_mine(self) -> bool:
        return self._pid == os.getpid()

    @property
    def _session(self) -> dict[str, Any]:
        session: dict[str, Any] = self._meta["sessions"][-1]
        return session

    @_session.setter
    def _session(self, session: dict[str, Any]) -> None:
        self._meta["sessions"][-1] = session

    @property
    def _last_step(self) -> int:
        last = None if self._recorder is None else self._recorder.last_step
        return int(self._session["start_step"]) - 1 if last is None else last

    def _end(self) -> None:
        """Write the ending, once."""
        if self._has_ended:
            return
        try:
            self._write_ending()
        except Exception:
            self._has_ended = True
            raise
        self._has_ended = True

    def _write_ending(self) -> None:
        recorder = self._opened()
        recorder.close()
        if recorder.failure:
            self._session["failed"] = recorder.failure
        self._session |= {"finished": time(), "records": recorder.number, "lines": recorder.num_lines}
        # What does not reach the disk may reach the page cache.
        error = self._write_meta(sync=True) and self._write_meta(sync=False)
        self._tell()
        if recorder.failure or error is not None:
            lost = f"{recorder.failure}; {recorder.num_lost:,} records missing"
            what = lost if recorder.failure else f"how it ended could not be written: {error}"
            warn(f"recording of {self.path} failed: {what}.", stacklevel=3)

    def _write_meta(self, *, sync: bool) -> Exception | None:
        assert self.path is not None
        try:
            replace_whole(self.path / "meta.json", sealed(self._meta).encode(), sync=sync)
        except Exception as error:
            return error
        return None

    def _tell(self) -> None:
        assert self._recorder is not None
        for news in self._recorder.take_news():
            warn(f"{self.path}: {news}", stacklevel=3)

    def _let_go(self) -> None:
        self._recorder = None
        off_termination(self)
        if self._lock is not None:
            self._lock.release()

    def _opened(self) -> Recorder:
        if self._recorder is None:
            raise GradwatchError(f"{self!r} is not open: call `open(meta)` first.")
        return self._recorder

    def _begin(self, path: Path, meta: RunMeta, lock: FolderLock) -> Recorder:
        for left in own_files(path):
            if left.suffix == ".tmp":  # of a process that was killed as it wrote
                left.unlink(missing_ok=True)
        file = path / "meta.json"
        before: dict[str, Any] = _checked(file) if file.exists() else {}
        sessions = [dict(s) for s in before.get("sessions", [])]
        number = 1 + max((int(s["number"]) for s in sessions), default=0)
        started = meta.started or time()
        sessions.append({"number": number, "start_step": meta.start_step, "started": started, "finished": None})
        self._meta = {
            "format": RUN_FORMAT,
            "schema": FOLDER_SCHEMA,
            "name": meta.name,
            "model": meta.model,
            "started": before.get("started", started),
            "versions": dict(meta.versions),
            "options": plain(dict(meta.options)),
            "limit_mb": self._settings["limit_mb"],
            "sessions": sessions,
        }
        replace_whole(file, sealed(self._meta).encode())
        return Recorder(path, session=number, lock=lock, settings=self._settings, to_block=_to_block)


def _to_block(held: Sequence[Held], gap: dict[str, Any] | None) -> Block:
    return encode(
        [h.record for h in held],
        index=held[0].index,
        numbers=[h.number for h in held],
        thinned=int(any(h.is_thinned for h in held)),
        gap=gap,
    )


def _checked(file: Path) -> dict[str, Any]:
    try:
        meta = json.loads(contents(file).decode("utf-8"))
        form, schema = meta["format"], int(meta["schema"])
        _ = [int(session["number"]) for session in meta.get("sessions", [])]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, RunFormatError):
            raise
        raise RunFormatError(f"{file} is not a gradwatch run's ({error!r}). Use another folder.") from None
    if form != RUN_FORMAT or schema > FOLDER_SCHEMA:
        raise RunFormatError(
            f"{file} is of format {form!r}, schema {schema}; this gradwatch continues {RUN_FORMAT!r} up to schema "
            f"{FOLDER_SCHEMA}. Use another folder, or update gradwatch."
        )
    return dict(meta)
