"""Data sets of the programs: made with numpy from fixed seeds, so that every run sees the same examples."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

__all__ = [
    "XOR",
    "binary_rows",
    "blobs",
    "glyphs",
    "irises",
    "one_hot",
    "poisson_labels",
    "rings",
    "scaled_features",
    "shuffled",
    "split",
    "table",
    "whole",
]

Floats = NDArray[np.float32]
Pair = tuple[NDArray, NDArray]
Data = tuple[NDArray, NDArray, NDArray, NDArray]

_Maker = TypeVar("_Maker", bound=Callable[..., Pair])


def _kept(make: _Maker) -> _Maker:
    """Make each data set once and hand out copies."""
    cached = lru_cache(maxsize=None)(make)

    @wraps(make)
    def copies(*args: object, **kwargs: object) -> Pair:
        x, y = cached(*args, **kwargs)
        return x.copy(), y.copy()

    return copies  # type: ignore[return-value]


def split(x: NDArray, y: NDArray, share: float = 0.7) -> Data:
    """Return training and validation data: the first `share` of the examples, and the rest."""
    n = int(len(x) * share)
    return x[:n], y[:n], x[n:], y[n:]


def whole(x: NDArray, y: NDArray) -> Data:
    """Return all examples twice: programs that evaluate on what they trained on."""
    return x, y, x, y


def one_hot(classes: NDArray, num_classes: int) -> Floats:
    """Return rows with a single 1."""
    return np.eye(num_classes, dtype=np.float32)[classes]


def shuffled(x: NDArray, y: NDArray, random: RandomState) -> Pair:
    order = random.permutation(len(x))
    return x[order], y[order]


@_kept
def blobs(seed: int = 2, n: int = 1000) -> Pair:
    """Three Gaussian clouds in the plane; classes (n,)."""
    random = RandomState(seed)
    centres = random.uniform(-10, 10, (3, 2))
    y = np.arange(n) % 3
    x = centres[y] + 2 * random.randn(n, 2)
    return shuffled(x.astype(np.float32), y, random)


@_kept
def rings(seed: int = 1, n: int = 1000) -> Pair:
    """Two noisy concentric circles of radius 1 and .8; labels (n, 1) of 0 and 1."""
    random = RandomState(seed)
    angle = random.uniform(0, 2 * np.pi, n)
    y = np.arange(n) % 2
    radius = np.where(y == 1, 0.8, 1.0)
    x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1) + 0.1 * random.randn(n, 2)
    x, y = shuffled(x.astype(np.float32), y, random)
    return x, y.astype(np.float32)[:, None]


@_kept
def glyphs(n: int = 3000, seed: int = 0, side: int = 28) -> Pair:
    """Ten smooth random images, moved by a pixel and noisy: digits of a kind, in [0, 1]; classes (n,)."""
    random = RandomState(seed)
    prototypes = np.stack([_smooth((random.rand(side, side) > 0.72).astype(float)) for _ in range(10)])
    prototypes = np.clip((prototypes / prototypes.max((1, 2), keepdims=True) - 0.35) * 2, 0, 1)
    y = random.randint(0, 10, n)
    moved = [np.roll(np.roll(prototypes[c], random.randint(-1, 2), 0), random.randint(-1, 2), 1) for c in y]
    x = np.stack(moved)
    x = np.clip(x + 0.15 * random.randn(*x.shape), 0, 1)
    return x.astype(np.float32).reshape(n, -1), y


def _smooth(image: NDArray, times: int = 3) -> NDArray:
    for _ in range(times):
        neighbours = np.roll(image, 1, 0) + np.roll(image, -1, 0) + np.roll(image, 1, 1) + np.roll(image, -1, 1)
        image = (image + neighbours) / 5
    return image


@_kept
def table(seed: int = 0, n: int = 392, width: int = 9) -> Pair:
    """A regression table of 392 rows and 9 correlated features; features and targets (n, 1) in [0, 1]."""
    random = RandomState(seed)
    hidden = random.randn(n, 3)
    x = hidden @ random.randn(3, width) + 0.5 * random.randn(n, width)
    y = 2 * np.tanh(x @ random.randn(width) / 3) + 0.5 * (x[:, 0] * x[:, 1]) / 3 + 0.2 * random.randn(n)
    x = (x - x.min(0)) / (x.max(0) - x.min(0))
    y = (y - y.min()) / (y.max() - y.min())
    return x.astype(np.float32), y.astype(np.float32)[:, None]


@_kept
def irises(seed: int = 0) -> Pair:
    """Three kinds of 50 flowers with four measures in centimetres; classes (150,)."""
    random = RandomState(seed)
    means = np.array([[5.0, 3.4, 1.5, 0.25], [5.9, 2.8, 4.3, 1.3], [6.6, 3.0, 5.6, 2.0]])
    y = np.repeat(np.arange(3), 50)
    x = means[y] + random.randn(150, 4) * [0.4, 0.33, 0.35, 0.2]
    return shuffled(x.astype(np.float32), y, random)


XOR: Pair = (
    np.array([[1, 1], [1, 0], [0, 0], [0, 1]], np.float32),
    np.array([[0], [1], [0], [1]], np.float32),
)


@_kept
def binary_rows(bits: int = 8) -> Pair:
    """Every row of 8 bits, and a permutation of the rows to learn."""
    n = 2**bits
    x = ((np.arange(n)[:, None] >> np.arange(bits)) & 1).astype(np.float32)
    return x, x[RandomState(0).permutation(n)]


@_kept
def poisson_labels(n: int = 3000) -> Pair:
    """Counts (n, 20), and three labels a row that may hold at once."""
    random = RandomState(0)
    x = random.poisson(2.5, (n, 20)).astype(np.float32)
    scores = x @ random.randn(20, 3)
    return x, (scores > np.median(scores, 0)).astype(np.float32)


@_kept
def scaled_features(n: int = 200) -> Pair:
    """Eleven positive features whose scales lie between 1 and 10,000, in float64; labels (n, 1)."""
    scales = np.array([1, 10, 100, 1e3, 1e4, 5, 50, 500, 5e3, 80, 443])
    random = RandomState(0)
    x = np.abs(random.randn(n, 11)) * scales
    score = x @ (random.randn(11) / scales)
    return x, (score > np.median(score)).astype(np.float32)[:, None]
