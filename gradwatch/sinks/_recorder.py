"""What a run folder is written by: records in memory and in the journal, folded into blocks by a thread of its own."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

from ..records import Incident, Index, StepRecord
from ._buffer import Buffer, Held
from ._files import replace_whole
from ._incident_lines import IncidentLines
from ._index_files import index_text, last_index
from ._journal import Journal
from ._lines import Lines
from ._lock import BEAT_SECONDS, FolderLock
from ._plain import sealed
from ._segments import Segments
from ._trouble import Trouble, reason
from .blocks import Block

__all__ = ["Recorder"]

SYNC_SECONDS = 10.0
STALE_BYTES = 8 << 20
"""Journals whose records are in blocks are dropped when these have reached the disk; sooner where they grow."""
PATIENCE = 10.0
"""How long `flush` and `close` wait for a disk that does not answer."""

ToBlock = Callable[[Sequence[Held], "dict[str, Any] | None"], Block]


class Recorder:
    """Keeps the records of one session until they are known to be written.

    The thread that trains does two things at a step: it appends the record to the journal, and holds it in memory.
    Everything that may take its time (blocks, syncing, thinning, trying again) is done by a thread of the recorder's.

    Args:
        folder: that is held by `lock`.
        session: number of this session.
        lock: of the folder; touched now and then, to show that its owner lives.
        settings: of the RunFolder.
        to_block: makes a block of records, and of what is to be told of missing ones.

    Attributes:
        number: of the next record.
        last_step: of the newest record; None before there is one.
        failure: why the last records could not be written as blocks; "" where they were.
        num_lost: how many of those are not in the journal either.
    """

    def __init__(
        self, folder: Path, *, session: int, lock: FolderLock, settings: Mapping[str, float], to_block: ToBlock
    ) -> None:
        self.folder, self._settings, self._to_block, self._lock = folder, settings, to_block, lock
        limit = int(settings["limit_mb"] * 2**20)
        self._segments = Segments(folder, session=session, limit_bytes=limit)
        self._journal = Journal(folder, session=session, limit_bytes=max(limit // 8, 1 << 20))
        self.incidents = IncidentLines(folder / "incidents.jsonl", session=session)
        self.annotations = Lines(folder / "annotations.jsonl")
        self._whole: dict[str, bytes] = {}
        self._writing_whole = threading.Lock()
        self._buffer = Buffer(int(settings["buffer_mb"] * 2**20))
        self._early: deque[Held] = deque()
        self._newest: Held | None = None
        self._skipped: dict[str, Any] | None = None
        self._index: Index | None = None
        self._index_number, self._index_json = last_index(folder)
        self._stale: list[Path] = []
        self._gap: dict[str, Any] | None = None
        self._trouble: Trouble | None = None
        self._takes_rows = True
        self._news: deque[str] = deque()
        self._folded = self._synced = monotonic()
        self._wants_sync = False
        self.failure, self.num_lost = "", 0
        self._mutex, self._turn, self._wake = threading.Lock(), threading.Lock(), threading.Event()
        self._answered = threading.Condition()
        self._asked = self._answers = 0
        self._is_stopped = False
        self._journal.switch(*self._journal.begin())
        self._thread = threading.Thread(
            target=_work, args=(weakref.ref(self), self._wake), name="gradwatch-recorder", daemon=True
        )
        self._thread.start()

    def __del__(self) -> None:
        with suppress(Exception):
            self._journal.close()

    # What the training does

    def keep(self, record: StepRecord, *, is_early: bool = False) -> None:
        """Take a record, once: in memory, and on record in the journal.

        Args:
            record: of a step that is over.
            is_early: it comes again when it was judged.
        """
        with self._mutex:
            held = self._newest
            if held is None or held.record is not record:
                if not is_early and self._early and self._take_early(record):
                    return
                held = Held(self.number, record, self._index_of(record))
                held.gap = self._skipped
                # First the number, then the place: what Ctrl-C stops in between is handed over again.
                self._newest, self._skipped = held, None
            elif not is_early and self._early and self._take_early(record):
                return
            if is_early:
                if not self._early or self._early[-1] is not held:
                    self._early.append(held)
            elif not self._buffer.held or self._buffer.held[-1] is not held:
                self._buffer.add(held)
            else:
                return
            self._write_row(held)
        if self._is_due:
            self._wake.set()

    def _take_early(self, record: StepRecord) -> bool:
        """Move what was kept early into its place, up to this record; return whether this was among it."""
        while self._early and self._early[0].record.step <= record.step:
            held = self._early[0]
            is_same = held.record.step == record.step
            if is_same and held.record is not record:
                held = Held(held.number, record, self._index_of(record))
                self._write_row(held)
            self._buffer.add(held)
            self._early.popleft()
            if is_same:
                return True
        return False

    def _write_row(self, held: Held) -> None:
        if not self._takes_rows:
            return
        try:
            held.is_journalled = self._journal.append(held.record, number=held.number, index=held.index)
        except Exception as error:
            self._takes_rows = False
            self._failed(error)

    def _index_of(self, record: StepRecord) -> int:
        if record.index is not self._index:
            # Where the same paths come in a new object, they are the same index.
            data = index_text(record.index)
            if data != self._index_json:
                self._index_number, self._index_json = self._index_number + 1, data
                self.put(f"index-{self._index_number:03d}.json", data)
            self._index = record.index
        return self._index_number

    def incident(self, incident: Incident) -> None:
        """Write a line, at once where something new is said, and see to it that it reaches the disk."""
        if self.incidents.note(incident):
            self._buffer.note_incident(incident.first_step)
            self._segments.protect(incident.first_step)
            self._write_lines(self.incidents)
            self._wants_sync = True
            self._wake.set()

    def annotate(self, line: Mapping[str, Any]) -> None:
        self.annotations.add(sealed(line))
        self._write_lines(self.annotations)

    def _write_lines(self, lines: Lines) -> None:
        if self._trouble is not None:
            return  # they wait
        try:
            lines.write()
        except Exception as error:
            self._failed(error)

    def put(self, name: str, content: str | bytes) -> None:
        """Write a whole file, at once or as soon as it can be written."""
        self._whole[name] = content.encode() if isinstance(content, str) else content
        if self._trouble is None:
            try:
                self._write_whole()
            except Exception as error:
                self._failed(error)

    def miss(self, count: int, why: str) -> None:
        """Count records that were let go before they came here: their numbers are left out."""
        with self._mutex:
            self._skipped = {"why": why, "count": count + (self._skipped["count"] if self._skipped else 0)}

    def take_news(self) -> list[str]:
        """Return what should be told to the user, once."""
        news = []
        while self._news:
            news.append(self._news.popleft())
        return news

    def flush(self, *, insist: bool = False) -> bool:
        """Let everything be written that is held; wait for it, but not for a disk that does not answer.

        Args:
            insist: now, whatever failed before.

        Returns:
            Whether the thread came to its end with it.
        """
        self.incidents.release()
        if insist:
            with self._mutex:
                while self._early:
                    self._buffer.add(self._early.popleft())
        if insist and self._trouble is not None:
            self._trouble.now()
        with self._answered:
            self._asked += 1
            ticket = self._asked
        self._wake.set()
        until = monotonic() + PATIENCE
        while self._thread.is_alive() and monotonic() < until:
            with self._answered:
                if self._answered.wait_for(lambda: self._answers >= ticket, 0.05):
                    return True
        if self._thread.is_alive():
            return False
        # It ended as the collector, or the interpreter's end, took it away.
        self.turn(insist=True)
        return True

    @property
    def in_trouble(self) -> str:
        """Why records are missing, or may come to be; "" where all are written."""
        trouble = self._trouble
        return self.failure or (trouble.why if trouble is not None else "")

    def close(self) -> None:
        """Write what is left, and stop. `failure` then says what is missing."""
        if threading.current_thread() is self._thread:
            # The collector found it here: the journal has everything, and who waited would wait for themselves.
            self._is_stopped = True
            return
        is_done = self.flush(insist=True)
        is_gone = self._journal.is_gone
        self._is_stopped = True
        self._wake.set()
        if is_done:
            self._thread.join(PATIENCE)
            last = self._journal.close()
            if last is not None and self._trouble is None and not self._buffer.held and not self._stale:
                self._journal.drop(last)
        if self._buffer.held or not is_done or self._gap or self._buffer.dropped:
            self.failure = self._trouble.why if self._trouble else "the disk did not answer"
            self.num_lost = sum(not held.is_journalled for held in self._buffer.held) + self._buffer.dropped
            if is_gone:  # and with it all that was on record
                self.num_lost = self.number

    def save(self, name: str, text: str) -> None:
        """Let what the journal has reach the disk, and write a file, now, in this thread: a signal may be the last.

        Takes no lock: it may have come while this very thread held one.
        """
        with suppress(Exception):
            self._journal.sync()
        with suppress(Exception):
            replace_whole(self.folder / name, text.encode(), sync=True)

    # What the thread does

    @property
    def _is_due(self) -> bool:
        settings = self._settings
        return (
            len(self._buffer) >= settings["flush_records"]
            or self._buffer.size >= settings["flush_mb"] * 2**20
            or (len(self._buffer) > 0 and monotonic() - self._folded > settings["flush_seconds"])
        )

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    @property
    def seconds(self) -> float:
        """How long there is nothing to do."""
        return BEAT_SECONDS if self._trouble is None else min(BEAT_SECONDS, self._trouble.seconds_left + 0.01)

    def serve(self) -> None:
        """Do what is due, and answer those who wait for it."""
        with self._answered:
            asked = self._asked
        self._lock.beat()
        self.turn(insist=asked > self._answers)
        with self._answered:
            self._answers = asked
            self._answered.notify_all()

    def turn(self, *, insist: bool = False) -> None:
        """Write what is due; `insist`: everything that is held."""
        with self._turn:
            if self._trouble is not None and self._trouble.is_pausing:
                return
            try:
                self._write_whole()
                self.incidents.write()
                self.annotations.write()
                if insist or self._is_due or self._trouble is not None:
                    self._fold()
                self._sync(insist)
            except Exception as error:
                self._failed(error)
            else:
                self._went_on()

    def _write_whole(self) -> None:
        if not self._whole or not self._writing_whole.acquire(blocking=False):
            return  # the other thread is about it
        try:
            for name, data in list(self._whole.items()):
                replace_whole(self.folder / name, data)
                if self._whole.get(name) is data:
                    del self._whole[name]
        finally:
            self._writing_whole.release()

    def _fold(self) -> None:
        """Write what is held as blocks. What can't be written is held again."""
        if not self._buffer.held:
            return
        file, path = self._journal.begin()
        with self._mutex:
            batch = self._buffer.take()
            before, old = self._journal.switch(file, path)
            for held in self._early:  # they stand in the journal alone
                self._write_row(held)
            if self._buffer.dropped:
                dropped, self._buffer.dropped = self._buffer.dropped, 0
                why = self._trouble.why if self._trouble else "records came faster than they could be written"
                known = self._gap["count"] if self._gap else 0
                self._gap = {"why": why, "count": known + dropped}
            if self._buffer.has_dropped:
                self._stale = []  # what was let go is nowhere but in the journals
        if before >= 0:
            os.close(before)
        if old is not None and not self._buffer.has_dropped:
            self._stale.append(old)
        self._buffer.has_dropped = False
        try:
            for part in _parts(list(batch), int(self._settings["flush_records"])):
                self._segments.append(self._to_block(part, self._gap or part[0].gap))
                self._gap = None
                del batch[: len(part)]
        except BaseException:
            with self._mutex:
                self._buffer.give_back(batch)
            raise
        self._folded = monotonic()

    def _sync(self, insist: bool) -> None:
        """Let what was written outlive the machine; then the journals go that it makes superfluous."""
        is_due = monotonic() - self._synced >= SYNC_SECONDS or self._wants_sync or insist
        if not is_due and self._journal.older_bytes < STALE_BYTES:
            return
        self._wants_sync = False
        self._segments.sync()
        stale, self._stale = self._stale, []
        for path in stale:
            self._journal.drop(path)
        self._journal.sync()
        self._synced = monotonic()

    def _failed(self, error: Exception) -> None:
        why = reason(error)
        if self._trouble is not None:
            self._trouble.again(why)
            return
        # What stands in the journal is on record.
        first = next((held for held in self._buffer.held if not held.is_journalled), self._newest)
        step = first.record.step if first is not None else 0
        self._trouble = Trouble(why, step)
        self._news.append(
            f"recording stopped at step {step:,}: {why}. The training goes on; records are held in memory, up to "
            f"{self._settings['buffer_mb']:g} MB of them, and writing is tried again."
        )

    def _went_on(self) -> None:
        trouble = self._trouble
        if trouble is None:
            return
        with self._mutex:
            self._trouble, self._takes_rows = None, True
            for held in (*self._buffer.held, *self._early):
                if not held.is_journalled:
                    self._write_row(held)
        step = self._newest.record.step if self._newest is not None else 0
        self._news.append(
            f"recording stopped at step {trouble.step:,}: {trouble.why}; it went on at {step:,}; "
            f"{self.num_missing:,} records missing."
        )

    @property
    def num_missing(self) -> int:
        """Records that were let go so far, for want of room."""
        return self._segments.num_missing

    @property
    def number(self) -> int:
        skipped = self._skipped["count"] if self._skipped else 0
        return int(skipped) + (0 if self._newest is None else self._newest.number + 1)

    @property
    def num_lines(self) -> list[int]:
        """Lines of incidents and of annotations that this session wrote."""
        return [self.incidents.num_written, self.annotations.num_written]

    @property
    def last_step(self) -> int | None:
        return None if self._newest is None else self._newest.record.step


def _parts(batch: Sequence[Held], most: int) -> Iterator[Sequence[Held]]:
    """Yield what makes a block each: records of one index, that follow one another."""
    start = 0
    for end in range(1, len(batch) + 1):
        is_last = end == len(batch) or batch[end].index != batch[start].index or batch[end].gap is not None
        if is_last or end - start == most:
            yield batch[start:end]
            start = end


def _work(reference: weakref.ref[Recorder], wake: threading.Event) -> None:
    while True:
        recorder = reference()
        if recorder is None or recorder.is_stopped:
            return
        seconds = recorder.seconds
        del recorder  # it may be collected meanwhile
        wake.wait(seconds)
        wake.clear()
        recorder = reference()
        if recorder is None or recorder.is_stopped:
            return
        recorder.serve()
        del recorder
