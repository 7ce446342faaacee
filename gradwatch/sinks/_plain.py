"""Plain values for JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

__all__ = ["dumps", "plain"]


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
    """Return compact JSON on one line."""
    return json.dumps(plain(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
