"""Blocks found in a file, whatever became of it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import RunFormatError
from ._block import FRAME, MAGIC, Block

__all__ = ["Damage", "scan"]

OLD_MAGIC = b"GWB1"
OLD_FRAME = struct.Struct("<4sIQI")
"""Of schema 1: magic, lengths of header and payload, CRC-32 of both."""

UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, MemoryError)


@dataclass(frozen=True)
class Damage:
    """Bytes that are no block.

    Attributes:
        start, end: in what was scanned.
        count: how many records were there; None where not even that can be read.
        steps: the first and the last of them.
        is_tail: a last block that is cut short: it is being written, or its writer was killed.
    """

    start: int
    end: int
    count: int | None = None
    steps: tuple[int, int] | None = None
    is_tail: bool = False


@dataclass(frozen=True)
class _Frame:
    """Where a block stands; `is_sure`: its lengths are known to be right."""

    body: int
    payload: int
    end: int
    checksum: int
    is_sure: bool
    count: int | None = None
    steps: tuple[int, int] | None = None


def scan(data: bytes, *, where: str = "block file") -> Iterator[tuple[int, Block | Damage]]:
    """Yield `(end, block)` for every whole block, and `(end, damage)` for what lies between.

    After damage it goes on at the next block. A cut last block comes last, as damage that is a tail.

    Raises:
        RunFormatError: a block is of a higher schema.
    """
    start = 0
    while start < len(data):
        frame = _frame_at(data, start)
        if frame is not None and frame.end <= len(data):
            block = _block(data, frame, where)
            if block is not None:
                yield frame.end, block
                start = frame.end
                continue
        end, damage = _damage(data, start, frame)
        yield end, damage
        start = end


def _damage(data: bytes, start: int, frame: _Frame | None) -> tuple[int, Damage]:
    """Return where to go on after what can't be read at `start`."""
    trusted = frame is not None and frame.is_sure
    if trusted and frame is not None and frame.end <= len(data):
        return frame.end, Damage(start, frame.end, frame.count, frame.steps)
    end = _next(data, start + 1)
    is_tail = end == len(data) and (frame is not None or _may_begin(data[start:]))
    count, steps = (frame.count, frame.steps) if trusted and frame is not None else (None, None)
    return end, Damage(start, end, count, steps, is_tail)


def _may_begin(rest: bytes) -> bool:
    """Whether so few bytes may be the beginning of a frame."""
    return len(rest) < FRAME.size and any(magic.startswith(rest[:4]) for magic in (MAGIC, OLD_MAGIC))


def _frame_at(data: bytes, start: int) -> _Frame | None:
    magic = data[start : start + 4]
    if magic == MAGIC and len(data) - start >= FRAME.size:
        fields = FRAME.unpack_from(data, start)
        _, header, payload, count, first, last, checksum, own = fields
        if zlib.crc32(data[start : start + FRAME.size - 4]) != own:
            return None
        body = start + FRAME.size
        return _Frame(body, body + header, body + header + payload, checksum, True, count, (first, last))
    if magic == OLD_MAGIC and len(data) - start >= OLD_FRAME.size:
        _, header, payload, checksum = OLD_FRAME.unpack_from(data, start)
        body = start + OLD_FRAME.size
        return _Frame(body, body + header, body + header + payload, checksum, False)
    return None


def _is_intact(data: bytes, frame: _Frame) -> bool:
    view = memoryview(data)
    header, payload = view[frame.body : frame.payload], view[frame.payload : frame.end]
    return zlib.crc32(payload, zlib.crc32(header)) == frame.checksum


def _block(data: bytes, frame: _Frame, where: str) -> Block | None:
    if not _is_intact(data, frame):
        return None
    try:
        return Block.from_bytes(
            data[frame.body : frame.payload], memoryview(data)[frame.payload : frame.end], where=where
        )
    except RunFormatError:
        raise
    except UNREADABLE:
        return None


def _next(data: bytes, start: int) -> int:
    """Return where the next block begins that can be told to be one; the end of the data where there is none."""
    while (start := data.find(MAGIC[:3], start)) >= 0:
        frame = _frame_at(data, start)
        if frame is not None and (frame.is_sure or (frame.end <= len(data) and _is_intact(data, frame))):
            return start
        start += 1
    return len(data)
