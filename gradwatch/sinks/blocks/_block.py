"""The frame of a block: a header in JSON and named arrays, with a checksum."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import RunFormatError
from ...records import SCHEMA_VERSION
from .._plain import dumps

__all__ = ["Block", "pack_bits", "scan", "segment_files", "unpack_bits"]

MAGIC = b"GWB1"
FRAME = struct.Struct("<4sIQI")


def pack_bits(bits: Any) -> NDArray[np.uint8]:
    return np.packbits(np.asarray(bits, np.bool_), axis=-1)


def unpack_bits(packed: NDArray[np.uint8], count: int) -> NDArray[np.bool_]:
    return np.unpackbits(packed, axis=-1, count=count).astype(np.bool_)


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

    def to_bytes(self) -> bytes:
        """Return the block as it is written to a file."""
        places: dict[str, list[Any]] = {}
        parts: list[bytes] = []
        offset = 0
        for name, array in self.arrays.items():
            array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            data = array.tobytes()
            padding = -len(data) % 8
            places[name] = [array.dtype.str, list(array.shape), offset]
            parts += [data, b"\0" * padding]
            offset += len(data) + padding
        header = dumps({"schema": SCHEMA_VERSION, **self.header, "arrays": places}).encode()
        payload = b"".join(parts)
        checksum = zlib.crc32(payload, zlib.crc32(header))
        return FRAME.pack(MAGIC, len(header), len(payload), checksum) + header + payload

    @classmethod
    def from_bytes(cls, header: bytes, payload: memoryview, *, where: str) -> Block:
        fields = json.loads(header)
        schema = fields.pop("schema", None)
        if not isinstance(schema, int) or schema > SCHEMA_VERSION:
            raise RunFormatError(
                f"{where}: a block has schema {schema}; this gradwatch reads up to {SCHEMA_VERSION}. Update gradwatch."
            )
        arrays = {}
        for name, (dtype, shape, offset) in fields.pop("arrays").items():
            count = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(payload, np.dtype(dtype), count, offset).reshape(shape)
        return cls(fields, arrays)


def scan(data: bytes, *, where: str = "block file") -> Iterator[tuple[int, Block | None]]:
    """Yield `(end, block)` for every whole block; None for one whose checksum differs, and for a rest that is no block.

    Stops without a word at a last block that is cut short, as SIGKILL or a full disk leaves it.

    Raises:
        RunFormatError: a block is of a higher schema.
    """
    view, start = memoryview(data), 0
    while len(data) - start >= FRAME.size:
        magic, header_length, payload_length, checksum = FRAME.unpack_from(data, start)
        if magic != MAGIC:
            yield len(data), None
            return
        body = start + FRAME.size
        end = body + header_length + payload_length
        if end > len(data):
            return
        header, payload = view[body : body + header_length], view[body + header_length : end]
        intact = zlib.crc32(payload, zlib.crc32(header)) == checksum
        yield end, Block.from_bytes(bytes(header), payload, where=where) if intact else None
        start = end


def segment_files(folder: Path) -> list[tuple[int, int, Path]]:
    """Return `(session, number, path)` of every record file, in the order they were written."""
    found = []
    for path in folder.glob("records-*-*.gwr"):
        parts = path.stem.split("-")
        if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit():
            found.append((int(parts[1]), int(parts[2]), path))
    return sorted(found)
