"""One record as a block of its own, in microseconds: what the journal takes at every step."""

from __future__ import annotations

import struct
import sys
import zlib
from typing import Any

import numpy as np

from ..records import StepRecord
from ._plain import dumps
from .blocks import FOLDER_SCHEMA, encode
from .blocks._block import FRAME, MAGIC, framed

__all__ = ["RowEncoder"]

IS_LITTLE = sys.byteorder == "little"
FIXED = struct.Struct("<q4q5dB7x")
ONE_BIT = b"\x80\0\0\0\0\0\0\0"
"""A row of bits of one record, in eight bytes."""
MAX_SHAPES = 256

INTEGERS = ("number", "step", "epoch", "batch_idx", "num_samples")
FLOATS = ("time", "loss", "lr", "global_norm", "global_norm_after")


class _Shape:
    """What is the same in all records with these names: the header, and how scalars are packed."""

    __slots__ = ("before", "behind", "bits", "checksum", "header", "scalars")

    def __init__(self, before: bytes, behind: bytes, scalars: struct.Struct, bits: bytes) -> None:
        self.before, self.behind, self.scalars, self.bits = before, behind, scalars, bits
        self.header = before + b"[]" + behind
        self.checksum = zlib.crc32(self.header)


class RowEncoder:
    """Encodes records one by one. What is the same from step to step (names, places) is written out once and kept.

    The bytes are those of an ordinary block with one record; `gradwatch.sinks.blocks.scan` reads them.
    """

    def __init__(self) -> None:
        self._shapes: dict[Any, _Shape] = {}
        self._mask, self._packed = b"", b""

    def encode(self, record: StepRecord, *, number: int, index: int) -> bytes:
        """Return a record's bytes.

        Args:
            record: to be written.
            number: of the record in its session.
            index: number of its index file.
        """
        columns, masks, n = record.columns, record.masks, len(record.index)
        if not IS_LITTLE or record.histograms or not masks.keys() <= columns.keys():
            return encode([record], index=index, numbers=[number]).to_bytes()
        scalars = record.scalars
        key = index, tuple(scalars), tuple(columns), tuple(masks)
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shape(key, n)
        flags = record.has_loss + 2 * record.skipped + 4 * (not record.has_gradient)
        parts = [
            FIXED.pack(
                number,
                record.step,
                record.epoch,
                record.batch_idx,
                record.num_samples,
                record.time,
                record.loss,
                record.lr,
                record.global_norm,
                record.global_norm_after,
                flags,
            )
        ]
        if scalars:
            parts += shape.scalars.pack(*scalars.values()), shape.bits
        for name, values in columns.items():
            parts.append(ONE_BIT)
            mask = masks.get(name)
            if mask is not None:
                raw = mask.tobytes()
                if raw != self._mask:  # the same from step to step
                    packed = np.packbits(mask).tobytes()
                    self._mask, self._packed = raw, packed + b"\0" * (-len(packed) % 8)
                parts += ONE_BIT, self._packed
            if values.dtype != np.float64 or len(values) != n:
                return encode([record], index=index, numbers=[number]).to_bytes()
            parts.append(values.tobytes())
        payload = b"".join(parts)
        if record.treatments or record.unseen:
            return framed(shape.before + _told(record) + shape.behind, payload, 1, record.step, record.step)
        checksum = zlib.crc32(payload, shape.checksum)
        frame = FRAME.pack(MAGIC, len(shape.header), len(payload), 1, record.step, record.step, checksum, 0)[:-4]
        return b"".join((frame, zlib.crc32(frame).to_bytes(4, "little"), shape.header, payload))

    def _shape(self, key: Any, n: int) -> _Shape:
        index, scalars, columns, masks = key
        places: dict[str, list[Any]] = {}
        offset = 0

        def put(name: str, dtype: str, *shape: int) -> None:
            nonlocal offset
            places[name] = [dtype, list(shape), offset]
            size = int(np.prod(shape)) * (1 if dtype == "|u1" else 8)
            offset += size + -size % 8

        for name in INTEGERS:
            put(name, "<i8", 1)
        for name in FLOATS:
            put(name, "<f8", 1)
        put("flags", "|u1", 1)
        k = len(scalars)
        if k:
            put("scalars", "<f8", k, 1)
            put("scalars.rows", "|u1", k, 1)
        for i, name in enumerate(columns):
            put(f"c{i}.rows", "|u1", 1)
            if name in masks:
                put(f"c{i}.masked", "|u1", 1)
                put(f"c{i}.masks", "|u1", 1, -(-n // 8))
            put(f"c{i}.values", "<f8", 1, n)
        header = {
            "schema": FOLDER_SCHEMA,
            "index": index,
            "count": 1,
            "thinned": 0,
            "scalars": list(scalars),
            "columns": list(columns),
            "histogram_paths": [],
        }
        before = dumps(header)[:-1] + ',"treatments":'
        behind = ',"arrays":' + dumps(places) + "}"
        if len(self._shapes) >= MAX_SHAPES:
            self._shapes.clear()
        bits = b"\x80" * k + b"\0" * (-k % 8)
        shape = self._shapes[key] = _Shape(before.encode(), behind.encode(), struct.Struct(f"<{k}d"), bits)
        return shape


def _told(record: StepRecord) -> bytes:
    """Return the treatments, and what was not seen, as the header says them."""
    treatments = [
        [
            0,
            t.name,
            t.rule,
            float(t.before),
            float(t.after),
            bool(t.applied),
            {k: float(v) for k, v in t.values.items()},
        ]
        for t in record.treatments
    ]
    told = dumps(treatments)
    if record.unseen:
        told += ',"unseen":' + dumps([[0, 0, dict(record.unseen)]])
    return told.encode()
