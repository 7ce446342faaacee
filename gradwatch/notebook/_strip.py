"""A row of colours as a picture, for a cell of a table: a PNG that stands in its own address."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode

import numpy as np
from numpy.typing import NDArray

from ..records import Floats

__all__ = ["HEIGHT", "MISSING", "gradient", "limits", "strip"]

MISSING = -np.inf
"""Not measured."""
HEIGHT = 12
"""Pixels on the page."""

_VIRIDIS = ("440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725")
_STOPS = np.array([[int(color[i : i + 2], 16) for i in (0, 2, 4)] for color in _VIRIDIS], np.float64)
_ZERO, _NONFINITE = (150, 150, 150), (229, 0, 46)


def limits(values: Floats) -> tuple[float, float]:
    """Return the range of colours in log10: from the 1st to the 99th percentile of what is finite and above zero."""
    seen = values[np.isfinite(values) & (values > 0)]
    if not len(seen):
        return -6.0, 0.0
    low, high = np.percentile(np.log10(seen), [1, 99])
    middle = (low + high) / 2
    return (float(low), float(high)) if high - low > 0.5 else (float(middle - 0.25), float(middle + 0.25))


def strip(values: Floats, low: float, high: float, *, width: int, said: str) -> str:
    """Return an image element: viridis for sizes, grey zero, red not finite, clear not measured.

    Args:
        values: (T,) sizes; `MISSING` where nothing was measured.
        low, high: of log10, as `limits` gives them.
        width: pixels on the page.
        said: what it shows, for those who can't see it; escaped already.
    """
    address = _png(_colors(values, low, high)[None])
    style = f"width:{width}px;height:{HEIGHT}px;image-rendering:pixelated;max-width:none"
    return f'<img alt="{said}" src="{address}" style="{style}">'


def gradient(width: int) -> str:
    """Return the scale of colours, from low to high."""
    return strip(10.0 ** np.linspace(0, 1, 64), 0.0, 1.0, width=width, said="scale of colours, from low to high")


def _colors(values: Floats, low: float, high: float) -> NDArray[np.uint8]:
    """Return RGBA, shape (T, 4)."""
    out = np.zeros((len(values), 4), np.uint8)
    sized = np.isfinite(values) & (values > 0)
    places = np.clip((np.log10(values[sized]) - low) / (high - low), 0, 1) * (len(_STOPS) - 1)
    colors = [np.interp(places, np.arange(len(_STOPS)), _STOPS[:, c]) for c in range(3)]
    out[sized, :3] = np.round(np.stack(colors, axis=1))
    out[values == 0, :3] = _ZERO
    out[~np.isfinite(values), :3] = _NONFINITE
    out[values != MISSING, 3] = 255
    return out


def _png(pixels: NDArray[np.uint8]) -> str:
    """Return the address of a picture of shape (H, W, 4)."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 6)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return f"data:image/png;base64,{b64encode(bytes([137, 80, 78, 71, 13, 10, 26, 10]) + body).decode()}"
