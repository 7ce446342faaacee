"""Plain values for JSON."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

__all__ = ["dumps", "is_sealed_well", "plain", "sealed"]


def plain(value: Any) -> Any:
    """Return `value` as JSON can hold it: non-finite floats as "nan", "inf" and "-inf", what is unknown as `str`."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Set):
        return [plain(v) for v in sorted(value, key=str)]
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return str(value)


def dumps(value: Any) -> str:
    """Return compact JSON on one line, which can be encoded whatever names it holds."""
    text = json.dumps(plain(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, from a file name
        text = json.dumps(plain(value), separators=(",", ":"), allow_nan=False)
    return text


_SEAL = re.compile(r',"crc":(\d{1,10})\}\s*$')

_RESEALED = re.compile(r'"crc"\s*:\s*\d+\s*\}\s*$')


def sealed(value: Mapping[str, Any]) -> str:
    """Return an object as JSON on one line whose last entry, `crc`, is the CRC-32 of the line without it."""
    text = dumps(value)
    return f'{text[:-1]},"crc":{zlib.crc32(text.encode())}}}' if len(text) > 2 else text


def is_sealed_well(text: str) -> bool:
    """Return whether a line is as it was written; older ones have no checksum, and are believed."""
    seal = _SEAL.search(text)
    if seal is None:
        # With a checksum in other clothes somebody has written it anew.
        return _RESEALED.search(text) is None
    return zlib.crc32((text[: seal.start()] + "}").encode(errors="replace")) == int(seal[1])
