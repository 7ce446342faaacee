"""The frame of a block: a header in JSON and named arrays, with checksums; and files of such blocks."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import RunFormatError
from .._plain import dumps

__all__ = [
    "FOLDER_SCHEMA",
    "FRAME",
    "MAGIC",
    "Block",
    "framed",
    "journal_files",
    "pack_bits",
    "places_of",
    "segment_files",
    "unpack_bits",
]

FOLDER_SCHEMA = 2
"""Of run folders. 1 had frames without a checksum and a step range of their own, and no journal."""

MAGIC = b"GWB2"
FRAME = struct.Struct("<4sIQIqqII")
"""Magic, lengths of header and payload, number of records, first and last step, CRC-32 of header and payload, and of
the frame up to there."""

DTYPES = frozenset({"<i8", "<f8", "<f4", "<i4", "<u2", "|u1"})


def pack_bits(bits: Any) -> NDArray[np.uint8]:
    return np.packbits(np.asarray(bits, np.bool_), axis=-1)


def unpack_bits(packed: NDArray[np.uint8], count: int) -> NDArray[np.bool_]:
    return np.unpackbits(packed, axis=-1, count=count).astype(np.bool_)


def framed(header: bytes, payload: bytes, count: int, first: int, last: int) -> bytes:
    """Return header and payload behind their frame."""
    checksum = zlib.crc32(payload, zlib.crc32(header))
    frame = FRAME.pack(MAGIC, len(header), len(payload), count, first, last, checksum, 0)[:-4]
    return b"".join((frame, struct.pack("<I", zlib.crc32(frame)), header, payload))


def places_of(arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, list[Any]], list[bytes]]:
    """Return where each array stands in the payload (dtype, shape, offset), and the payload's parts."""
    places: dict[str, list[Any]] = {}
    parts: list[bytes] = []
    offset = 0
    for name, array in arrays.items():
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        data = array.tobytes()
        padding = -len(data) % 8
        places[name] = [array.dtype.str, list(array.shape), offset]
        parts += [data, b"\0" * padding]
        offset += len(data) + padding
    return places, parts


@dataclass(frozen=True, eq=False)
class Block:
    """Records of one index, as arrays.

    Attributes:
        header: plain values: `index`, `count`, `thinned`, `scalars`, `columns`, `treatments`, `histogram_paths`.
        arrays: by name; see docs/formats.md.
    """

    header: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return int(self.header["count"])

    @property
    def steps(self) -> NDArray[np.int64]:
        return self.arrays["step"]

    @property
    def numbers(self) -> NDArray[np.int64] | None:
        """Each record's number in its session; None in folders that did not count."""
        return self.arrays.get("number")

    def to_bytes(self) -> bytes:
        """Return the block as it is written to a file."""
        places, parts = places_of(self.arrays)
        header = dumps({"schema": FOLDER_SCHEMA, **self.header, "arrays": places}).encode()
        steps = self.steps
        first, last = (int(steps.min()), int(steps.max())) if len(steps) else (0, 0)
        return framed(header, b"".join(parts), len(self), first, last)

    @classmethod
    def from_bytes(cls, header: bytes, payload: memoryview, *, where: str) -> Block:
        """Return the block of a frame.

        Raises:
            RunFormatError: it is of a higher schema.
            ValueError, TypeError, KeyError, AttributeError: it is no block, whatever its checksum says.
        """
        fields = json.loads(header)
        schema = fields.pop("schema", None)
        if isinstance(schema, int) and schema > FOLDER_SCHEMA:
            raise RunFormatError(
                f"{where}: a block has schema {schema}; this gradwatch reads up to {FOLDER_SCHEMA}. Update gradwatch."
            )
        arrays = {}
        for name, (dtype, shape, offset) in fields.pop("arrays").items():
            if dtype not in DTYPES or not all(isinstance(n, int) and n >= 0 for n in [*shape, offset]):
                raise ValueError(f"array {name!r} is of no kind that is written")
            count = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(payload, np.dtype(dtype), count, offset).reshape(shape)
        return cls(fields, arrays)


def segment_files(folder: Path) -> list[tuple[int, int, Path]]:
    """Return `(session, number, path)` of every record file, in the order they were written."""
    return _numbered(folder, "records-*-*.gwr")


def journal_files(folder: Path) -> list[tuple[int, int, Path]]:
    """Return `(session, number, path)` of every journal, in the order they were written."""
    return _numbered(folder, "journal-*-*.gwj")


def _numbered(folder: Path, pattern: str) -> list[tuple[int, int, Path]]:
    found = []
    for path in folder.glob(pattern):
        parts = path.stem.split("-")
        if len(parts) == 3 and all(p.isascii() and p.isdigit() for p in parts[1:]):
            found.append((int(parts[1]), int(parts[2]), path))
    return sorted(found)
