"""What stands in the files of a log already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

__all__ = ["events_of"]


def events_of(folder: str, most_bytes: int) -> Iterator[Any] | None:
    """Return the events of a log in the order of its files; None where these are larger together, or lie elsewhere."""
    if not folder or "://" in folder:
        return None
    files = sorted(p for p in Path(folder).glob("*tfevents*") if p.is_file())
    if sum(file.stat().st_size for file in files) > most_bytes:
        return None
    return _read(files)


def _read(files: list[Path]) -> Iterator[Any]:
    for file in files:
        with suppress(Exception):  # a cut file: what stands before the cut counts
            for data in RawEventFileLoader(str(file)).Load():
                yield Event.FromString(data)
