"""Protocol buffers of the values in an event."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_SCALAR,
    DATA_CLASS_TENSOR,
    HistogramProto,
    Summary,
    SummaryMetadata,
)
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

from ..._text import as_bytes, printable
from ...records import Bools, Floats, Histogram
from .._plain import dumps

__all__ = [
    "PLUGIN_NAME",
    "clean_tag",
    "encode_missing",
    "histogram",
    "scalar",
    "signed_buckets",
    "strings",
    "tensor",
    "text",
]

PLUGIN_NAME = "gradwatch"
MAX_TAG = 200
LARGEST = float(np.finfo(np.float32).max)


def clean_tag(tag: str) -> str:
    """Return a tag that every reader takes: printable, and of bounded length. A changed one ends in a digest."""
    if tag.isascii() and tag.isprintable() and len(tag) <= MAX_TAG:
        return tag
    clean = printable(tag, keep="")
    if clean == tag and len(tag) <= MAX_TAG:
        return tag
    digest = hashlib.sha256(as_bytes(tag)).hexdigest()[:8]
    return f"{clean[:MAX_TAG]}-{digest}"


def scalar(tag: str, value: float, about: str = "") -> Any:
    """Return a scalar. The field is a float32: a finite value beyond it becomes the largest one, and not infinity.

    Args:
        tag: of the series.
        value: any float.
        about: what the series is, in markdown; with its first value.
    """
    if np.isfinite(value):
        value = min(max(value, -LARGEST), LARGEST)
    return Summary.Value(tag=clean_tag(tag), simple_value=value, metadata=_about("scalars", DATA_CLASS_SCALAR, about))


def text(tag: str, markdown: str, about: str = "") -> Any:
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    metadata = SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR, summary_description=about)
    return Summary.Value(tag=clean_tag(tag), metadata=metadata, tensor=_string_proto([markdown]))


def histogram(tag: str, edges: Floats, counts: NDArray[np.int64], about: str = "") -> Any:
    """Return a value for the stock dashboard; its outer edges are its minimum and maximum."""
    middle = (edges[:-1] + edges[1:]) / 2
    square = middle**2
    five = (edges[0], edges[-1], counts.sum(), middle @ counts, square @ counts)
    # The first bucket is taken to begin at `min` only when an empty one stands before it.
    bucket = np.concatenate([[0.0], counts])
    length = _varint(8 * len(edges))
    # On the wire, where an array is its own bytes: given number by number it would take ten times as long.
    wire = b"".join(
        [
            *(bytes([field << 3 | 1]) + struct.pack("<d", number) for field, number in enumerate(five, start=1)),
            *(bytes([6 << 3 | 2]), length, edges.astype("<f8").tobytes()),
            *(bytes([7 << 3 | 2]), length, bucket.astype("<f8").tobytes()),
        ]
    )
    metadata = _about("histograms", DATA_CLASS_TENSOR, about)
    return Summary.Value(tag=clean_tag(tag), histo=HistogramProto.FromString(wire), metadata=metadata)


def _about(plugin: str, data_class: int, about: str) -> Any:
    """Return metadata with a description; None without one: readers make their own of a plain value."""
    if not about:
        return None
    data = SummaryMetadata.PluginData(plugin_name=plugin)
    return SummaryMetadata(plugin_data=data, data_class=data_class, summary_description=printable(about))


def _varint(number: int) -> bytes:
    """Return a protocol buffer's variable-length integer."""
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def tensor(tag: str, array: NDArray[Any], content: Mapping[str, Any] | None) -> Any:
    """Return a plugin tensor; `content` is what the metadata of a series' first event says."""
    single = array.dtype == np.float32
    proto = TensorProto(
        dtype=types_pb2.DT_FLOAT if single else types_pb2.DT_DOUBLE,
        tensor_shape=_shape(array.shape),
        tensor_content=np.ascontiguousarray(array, "<f4" if single else "<f8").tobytes(),
    )
    return Summary.Value(tag=clean_tag(tag), metadata=_metadata(content), tensor=proto)


def strings(tag: str, texts: str | Sequence[str], content: Mapping[str, Any] | None) -> Any:
    """Return a plugin tensor of strings: a scalar, or a vector."""
    return Summary.Value(tag=clean_tag(tag), metadata=_metadata(content), tensor=_string_proto(texts))


def encode_missing(values: Floats, measured: Bools) -> NDArray[Any]:
    """Return the values in float32 (float64 where they don't fit) with negative zero for what was not measured."""
    values = np.where(measured, values + 0.0, -0.0)  # + 0.0: a measured zero is a positive one
    with np.errstate(all="ignore"):
        small = values.astype(np.float32)
    fits = (np.isfinite(small) | ~np.isfinite(values)) & ((small != 0) | (values == 0))
    return small if fits.all() else values


def signed_buckets(counts: Histogram, max_buckets: int = 40) -> tuple[Floats, NDArray[np.int64]]:
    """Return edges (n+1,) and counts (n,) of the values with their sign; the middle bucket holds zeros.

    Neighbouring exponents are merged until at most `max_buckets` remain. Non-finite values are left out.
    """
    both = counts.magnitude_counts[1:255]
    filled = np.flatnonzero(both)
    if not len(filled):
        tiny = 2.0**-126
        return np.array([-tiny, tiny]), np.array([counts.zeros])
    groups = (max_buckets - 1) // 2
    low, high = int(filled[0]), int(filled[-1]) + 1
    width = -(-(high - low) // groups)
    starts = np.arange(low, high, width)
    positive = np.add.reduceat(counts.counts[1:255][:high], starts)
    negative = np.add.reduceat(counts.counts[257:511][:high], starts)
    magnitudes = 2.0 ** (np.append(starts, starts[-1] + width) + 1 - 127.0)
    edges = np.concatenate([-magnitudes[::-1], magnitudes])
    merged = np.concatenate([negative[::-1], [counts.zeros], positive])
    used = np.flatnonzero(merged)
    return edges[used[0] : used[-1] + 2], merged[used[0] : used[-1] + 1]


def _metadata(content: Mapping[str, Any] | None) -> Any:
    if content is None:
        return None
    plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME, content=dumps(content).encode())
    return SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR)


def _shape(sizes: Sequence[int]) -> Any:
    return TensorShapeProto(dim=[TensorShapeProto.Dim(size=n) for n in sizes])


def _string_proto(texts: str | Sequence[str]) -> Any:
    single = isinstance(texts, str)
    values = [texts] if isinstance(texts, str) else list(texts)
    return TensorProto(
        dtype=types_pb2.DT_STRING,
        string_val=[t.encode(errors="replace") for t in values],
        tensor_shape=_shape([] if single else [len(values)]),
    )
