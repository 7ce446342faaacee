"""Ways in which files come to harm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Bytes = Callable[[bytearray, np.random.Generator], str]

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", "nan", "\ud800", "x" * 300, [], [[]], {},
    [None], {"a": {"b": []}},
)  # fmt: skip


def damage_bytes(file: Path, rng: np.random.Generator) -> str:
    """Damage one file in a way drawn at random; return which."""
    data = bytearray(file.read_bytes())
    way = WAYS[int(rng.integers(len(WAYS)))]
    said = way(data, rng)
    file.write_bytes(bytes(data))
    return said


def damage_json(file: Path, rng: np.random.Generator) -> str:
    """Put an odd value somewhere into a JSON file, or into one line of a file of JSON lines."""
    lines = file.read_text(encoding="utf-8").split("\n")
    chosen = [i for i, line in enumerate(lines) if line.strip()]
    if not chosen:
        return damage_bytes(file, rng)
    number = chosen[int(rng.integers(len(chosen)))]
    try:
        value = json.loads(lines[number])
    except ValueError:
        return damage_bytes(file, rng)
    said, value = put_odd(value, rng)
    lines[number] = json.dumps(value)
    file.write_text("\n".join(lines), encoding="utf-8")
    return said


def put_odd(value: Any, rng: np.random.Generator) -> tuple[str, Any]:
    """Return the value with an odd one in some place of it, and which place in words."""
    places = list(_places(value, ()))
    place = places[int(rng.integers(len(places)))]
    odd = ODD[int(rng.integers(len(ODD)))]
    if not place:
        return f"everything is {odd!r:.40}", odd
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if rng.random() < 0.2:
        del inner[place[-1]]
        return f"without {place!r:.60}", value
    inner[place[-1]] = odd
    return f"{place!r:.60} is {odd!r:.40}", value


def _places(value: Any, at: tuple[Any, ...]) -> Any:
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*at, key))


def _span(data: bytearray, rng: np.random.Generator) -> tuple[int, int]:
    start = int(rng.integers(len(data) + 1))
    return start, min(start + int(rng.integers(1, 200)), len(data))


def flip(data: bytearray, rng: np.random.Generator) -> str:
    count = int(rng.integers(1, 9))
    for place in rng.integers(len(data), size=count).tolist() if data else []:
        data[place] ^= 1 << int(rng.integers(8))
    return f"{count} bits flipped"


def overwrite(data: bytearray, rng: np.random.Generator) -> str:
    start, end = _span(data, rng)
    data[start:end] = rng.bytes(end - start)
    return f"bytes {start} to {end} at random"


def blank(data: bytearray, rng: np.random.Generator) -> str:
    start, end = _span(data, rng)
    data[start:end] = bytes(end - start)
    return f"bytes {start} to {end} zero"


def truncate(data: bytearray, rng: np.random.Generator) -> str:
    end = int(rng.integers(len(data) + 1))
    del data[end:]
    return f"cut at {end}"


def remove(data: bytearray, rng: np.random.Generator) -> str:
    start, end = _span(data, rng)
    del data[start:end]
    return f"bytes {start} to {end} gone"


def insert(data: bytearray, rng: np.random.Generator) -> str:
    start, end = _span(data, rng)
    data[start:start] = rng.bytes(end - start)
    return f"{end - start} bytes more at {start}"


def repeat(data: bytearray, rng: np.random.Generator) -> str:
    start, end = _span(data, rng)
    data[start:start] = data[start:end]
    return f"bytes {start} to {end} twice"


def replace_all(data: bytearray, rng: np.random.Generator) -> str:
    data[:] = rng.bytes(int(rng.integers(400)))
    return f"{len(data)} bytes at random instead"


WAYS: tuple[Bytes, ...] = (flip, flip, overwrite, blank, truncate, remove, insert, repeat, replace_all)
