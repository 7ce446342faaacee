"""What travels to the browser: matrices as bytes, so that nan, inf and "not measured" survive.

Shapes: T steps, N paths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MISSING", "columns_of", "pack", "pool", "sizes", "unpack"]

MISSING = -np.inf
"""In a matrix here: not measured. Loses against everything in a maximum, as nan wins."""

Matrix = NDArray[np.float32]
Steps = NDArray[np.float64]


def columns_of(num_steps: int, columns: int) -> NDArray[np.int64]:
    """Return the first step of each of at most `columns` groups of neighbouring steps."""
    if columns <= 0 or num_steps <= columns:
        return np.arange(num_steps)
    return np.linspace(0, num_steps, columns, endpoint=False).astype(np.int64)


def pool(steps: Steps, matrix_TN: Matrix, columns: int) -> tuple[Steps, Matrix]:
    """Return at most `columns` steps, each with the largest value of the steps it stands for.

    A spike or a nan of one step survives: nan wins over inf over finite over `MISSING`.
    """
    first = columns_of(len(steps), columns)
    if len(first) == len(steps):
        return steps, matrix_TN
    return steps[first], np.maximum.reduceat(matrix_TN, first, axis=0)


def sizes(values_TN: NDArray[Any], measured_TN: NDArray[np.bool_]) -> Matrix:
    """Return magnitudes in float32: finite stays finite, non-zero stays so; `MISSING` where nothing was measured."""
    limits, exact_TN = np.finfo(np.float32), np.abs(values_TN)
    with np.errstate(over="ignore", under="ignore"):
        sizes_TN = exact_TN.astype(np.float32)
    odd = ~((sizes_TN > 0) & (sizes_TN < np.inf))
    if odd.any():
        exact = exact_TN[odd]
        positive = np.isfinite(exact) & (exact > 0)
        narrowed = np.clip(exact, float(limits.smallest_subnormal), float(limits.max))
        sizes_TN[odd] = np.where(positive, narrowed, exact).astype(np.float32)
    if not measured_TN.all():
        sizes_TN[~measured_TN] = MISSING
    return sizes_TN


def pack(steps: Steps, matrix_TN: Matrix, header: Mapping[str, Any], ends: Steps | None = None) -> bytes:
    """Return float64 length of the header, the header as JSON, float64 steps, float64 last steps, float32 matrix, row
    by row.

    Args:
        steps: first step that a row stands for.
        matrix_TN: rows in time.
        header: more to say of it.
        ends: last step that a row stands for; None: its first.
    """
    shape = {"steps": matrix_TN.shape[0], "rows": matrix_TN.shape[1]}
    head = json.dumps({**header, **shape}, allow_nan=False).encode()
    head += b" " * (-len(head) % 8)
    return b"".join(
        (
            np.float64(len(head)).tobytes(),
            head,
            np.ascontiguousarray(steps, "<f8").tobytes(),
            np.ascontiguousarray(steps if ends is None else ends, "<f8").tobytes(),
            np.ascontiguousarray(matrix_TN, "<f4").tobytes(),
        )
    )


def unpack(body: bytes) -> tuple[dict[str, Any], Steps, Matrix]:
    """Return header, steps and matrix of what `pack` made; the last steps are the header's `ends`."""
    length = int(np.frombuffer(body, "<f8", 1)[0])
    header = json.loads(body[8 : 8 + length])
    steps = np.frombuffer(body, "<f8", header["steps"], 8 + length)
    ends = np.frombuffer(body, "<f8", header["steps"], 8 + length + steps.nbytes)
    matrix = np.frombuffer(body, "<f4", offset=8 + length + 2 * steps.nbytes)
    return {**header, "ends": ends}, steps, matrix.reshape(header["steps"], header["rows"])
