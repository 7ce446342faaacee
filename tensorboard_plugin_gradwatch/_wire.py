"""What travels to the browser: matrices as bytes, so that nan, inf and "not measured" survive.

Shapes: T steps, N paths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MISSING", "columns_of", "pack", "pool", "unpack"]

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


def pack(steps: Steps, matrix_TN: Matrix, header: Mapping[str, Any]) -> bytes:
    """Return float64 length of the header, the header as JSON, float64 steps, float32 matrix, step by step."""
    shape = {"steps": matrix_TN.shape[0], "rows": matrix_TN.shape[1]}
    head = json.dumps({**header, **shape}, allow_nan=False).encode()
    head += b" " * (-len(head) % 8)
    return b"".join(
        (
            np.float64(len(head)).tobytes(),
            head,
            np.ascontiguousarray(steps, "<f8").tobytes(),
            np.ascontiguousarray(matrix_TN, "<f4").tobytes(),
        )
    )


def unpack(body: bytes) -> tuple[dict[str, Any], Steps, Matrix]:
    """Return header, steps and matrix of what `pack` made."""
    length = int(np.frombuffer(body, "<f8", 1)[0])
    header = json.loads(body[8 : 8 + length])
    steps = np.frombuffer(body, "<f8", header["steps"], 8 + length)
    matrix = np.frombuffer(body, "<f4", offset=8 + length + steps.nbytes)
    return header, steps, matrix.reshape(header["steps"], header["rows"])
