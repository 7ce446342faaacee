"""Scalars of TensorBoard event files."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .._warn import warn
from ..errors import RunFormatError

__all__ = ["event_run", "read_events"]

LENGTH = struct.Struct("<QI")
"""How a record of an event file begins: its length, and the masked CRC-32C of that; its own CRC comes behind it."""


def event_run(path: Path) -> Path:
    """Return the event file, or the one directory at or below `path` that holds event files.

    Raises:
        RunFormatError: there is none, or there are several.
    """
    if path.is_file():
        return path
    if any(path.glob("*tfevents*")):
        return path
    found = sorted({file.parent for file in path.rglob("*tfevents*") if file.is_file()})
    # Our own sub-run of a log directory holds a layout, and no scalars.
    found = [f for f in found if f.parent not in found]
    if len(found) == 1:
        return found[0]
    if not found:
        raise RunFormatError(f"{path} holds neither event files nor is it a CSV file.")
    names = ", ".join(str(f.relative_to(path)) for f in found[:8])
    raise RunFormatError(
        f"{path} holds {len(found)} runs; give one of them: {names}{', ...' if len(found) > 8 else ''}."
    )


def read_events(path: Path) -> dict[str, dict[int, float]]:
    """Return every scalar, tag -> step -> value. Where a step was written twice, the later one holds.

    Where bytes are damaged it says so and reads on behind them, which TensorBoard's own readers do not.

    Raises:
        RunFormatError: tensorboard is not installed, or the files hold no events.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
    except ImportError:
        raise RunFormatError(
            f"{path}: reading event files needs the package tensorboard: pip install 'gradwatch[tensorboard]'."
        ) from None
    scalars, damages = _Scalars(SessionLog.START), list[str]()
    for file in [path] if path.is_file() else sorted(path.glob("*tfevents*")):
        try:
            data = file.read_bytes()
        except OSError as error:
            warn(f"{file} can't be read, and what it holds is missing: {error}", stacklevel=3)
            continue
        for start, end, found in _records(data, lambda part: int(masked_crc32c(part))):
            if found is None or not scalars.take(found, Event):
                where = f"bytes {start:,} to {end:,} of {len(data):,}"
                damages.append(f"{file}: {where} are damaged and left out; the rest is read.")
    if not scalars.num_events:
        raise RunFormatError(f"{path} can't be read as event files: there is no event in it.")
    for damage in damages:
        warn(damage, stacklevel=3)
    return {tag: series for tag, series in scalars.series.items() if series}


def _records(data: bytes, checksum: Callable[[bytes], int]) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield where each record begins and ends, and what it holds; None for bytes that are none."""
    start = 0
    while start < len(data):
        length = _length_at(data, start, checksum)
        if length is not None:
            body = start + LENGTH.size
            found = data[body : body + length]
            own = int.from_bytes(data[body + length : body + length + 4], "little")
            end = min(body + length + 4, len(data))
            yield start, end, found if checksum(found) == own else None
        else:
            end = _next(data, start + 1, checksum)
            yield start, end, None
        start = end


def _length_at(data: bytes, start: int, checksum: Callable[[bytes], int]) -> int | None:
    """Return the length of the record that begins there whole; None where none does."""
    if len(data) - start < LENGTH.size + 4:
        return None
    length, own = LENGTH.unpack_from(data, start)
    if length > len(data) - start - LENGTH.size - 4 or checksum(data[start : start + 8]) != own:
        return None
    return int(length)


def _next(data: bytes, start: int, checksum: Callable[[bytes], int]) -> int:
    """Return where the next whole record begins; the end of the data where there is none."""
    # The upper half of a length is zero: to compute a checksum at every byte would take minutes.
    while (zeros := data.find(b"\0\0\0\0", start + 4)) >= 0:
        if _length_at(data, zeros - 4, checksum) is not None:
            return zeros - 4
        start = zeros - 3
    return len(data)


class _Scalars:
    """Scalars of events, in their order; a program that was started again takes back what it had written beyond."""

    def __init__(self, restart: int) -> None:
        self.series: dict[str, dict[int, float]] = {}
        self.num_events = 0
        self._restart = restart
        self._is_scalar: dict[str, bool] = {}
        self._says_restarts = False
        self._last = 0

    def take(self, data: bytes, event_type: Any) -> bool:
        """Return whether it was an event."""
        try:
            event = event_type.FromString(data)
            self._take(event)
        except Exception:  # protobuf's own errors have no common class that is public
            return False
        self.num_events += 1
        return True

    def _take(self, event: Any) -> None:
        step = int(event.step)
        if event.HasField("file_version"):
            version = event.file_version.rpartition(":")[2]
            self._says_restarts = version.replace(".", "").isdigit() and float(version) >= 2
        elif event.HasField("session_log") and event.session_log.status == self._restart:
            self._take_back(step, list(self.series))
        if not event.HasField("summary"):
            return
        if not self._says_restarts and step < self._last:
            self._take_back(step, [value.tag for value in event.summary.value])
        self._last = step
        for value in event.summary.value:
            number = self._number(value)
            if number is not None:
                self.series.setdefault(value.tag, {})[step] = number

    def _take_back(self, step: int, tags: list[str]) -> None:
        for tag in tags:
            self.series[tag] = {s: v for s, v in self.series.get(tag, {}).items() if s < step}

    def _number(self, value: Any) -> float | None:
        if value.HasField("simple_value"):
            return float(value.simple_value)
        if not value.HasField("tensor"):
            return None
        # Which plugin a tag is for stands in its first event alone.
        plugin = value.metadata.plugin_data.plugin_name
        if self._is_scalar.setdefault(value.tag, plugin == "scalars"):
            from tensorboard.util.tensor_util import make_ndarray

            return float(make_ndarray(value.tensor).item())
        return None
