"""Memory of rules as plain values, for checkpoints that load with `weights_only`."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..records import Index

__all__ = ["from_plain", "realign", "to_plain"]


def to_plain(value: Any) -> Any:
    """Return the value as str, int, float, bool, None, list, tuple and dict. Arrays become their bytes in base64."""
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value)
        return {"__array__": data.dtype.str, "shape": list(data.shape), "data": b64encode(data.tobytes()).decode()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [to_plain(v) for v in value]
    if isinstance(value, tuple):
        return tuple(to_plain(v) for v in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a rule's memory holds plain values and numpy arrays. Got {type(value).__name__}.")


def from_plain(value: Any, like: Any = None) -> Any:
    """Return what `to_plain` was given; `like` gives the type of a named tuple."""
    if isinstance(value, Mapping):
        if "__array__" in value:
            data = np.frombuffer(b64decode(value["data"]), np.dtype(value["__array__"]))
            return data.reshape(value["shape"]).copy()
        return {k: from_plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    if isinstance(value, tuple):
        items = tuple(from_plain(v) for v in value)
        return type(like)(*items) if hasattr(like, "_fields") else items
    return value


def realign(state: Any, old: Mapping[str, int], new: Index) -> Any:
    """Return the state with its "per_path" arrays moved to another index; paths that are new have no memory yet."""
    if not isinstance(state, dict) or not state.get("per_path"):
        return state
    source = np.array([old.get(p, -1) for p in new.paths], np.int64)
    moved = {
        name: tuple(_moved(v, source) for v in value) if isinstance(value, tuple) else _moved(value, source)
        for name, value in state["per_path"].items()
    }
    return {**state, "per_path": moved}


def _moved(array: Any, source: Any) -> Any:
    known = source >= 0
    fresh = np.full((*array.shape[:-1], len(source)), np.nan if array.dtype.kind == "f" else 0, array.dtype)
    fresh[..., known] = array[..., source[known]]
    return fresh
