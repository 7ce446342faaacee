"""The layout of the Custom Scalars dashboard: bands over layers, for those without the GradWatch tab."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2

from ...records import StepRecord
from .._headline import newest, weights
from ._descriptions import BAND_TITLES, Descriptions
from ._events import events_of
from ._values import scalar

__all__ = ["band_values", "layout_value", "layouts_in"]

TAG = "custom_scalars__config__"
MOST_BYTES = 4 << 20
"""Size of a log up to which it is looked through for a layout: that stands at its beginning, and is read in no time."""

QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


def band_values(name: str, window: Sequence[StepRecord], about: Descriptions) -> list[Any]:
    """Return the quantiles over layers of what the window measured; nan counts as the largest of all."""
    values = []
    for column in BAND_TITLES:
        record = newest(window, column)
        if record is None:
            continue
        modules = record.measured(column) & record.index.is_module
        layers = np.sort(record.columns[column][modules] if modules.any() else weights(record, column))
        if len(layers):
            # The nearest one, not between two of them: inf minus inf is nan.
            for quantile, share in QUANTILES.items():
                tag = f"{name}_bands/{column}/{quantile}"
                value = float(layers[round(share * (len(layers) - 1))])
                values.append(scalar(tag, value, about.band(tag, column, quantile)))
    return values


def layouts_in(folder: str) -> Any | None:
    """Return the newest layout in a log's files, an empty one where there is none; None where they can't be looked
    through."""
    events = events_of(folder, MOST_BYTES)
    if events is None:
        return None
    found = layout_pb2.Layout()
    for event in events:
        for value in event.summary.value:
            if value.tag == TAG and value.tensor.string_val:
                found = layout_pb2.Layout.FromString(value.tensor.string_val[0])
    return found


def layout_value(name: str, known: Any | None) -> Any | None:
    """Return the layout with a category for gradwatch's bands; None where there is one already.

    Of several layouts in a run TensorBoard shows the newest alone, so ours repeats what is there. In a run of its own,
    where it would merge, it would stand in every list of runs.

    Args:
        name: of the category; tags begin with it.
        known: the layout that is there; None: not known, and nothing may be put in its place.
    """
    if known is None or any(category.title == name for category in known.category):
        return None
    charts = [
        layout_pb2.Chart(
            title=title,
            margin=layout_pb2.MarginChartContent(
                series=[
                    layout_pb2.MarginChartContent.Series(
                        value=f"{name}_bands/{column}/median",
                        lower=f"{name}_bands/{column}/p10",
                        upper=f"{name}_bands/{column}/p90",
                    )
                ]
            ),
        )
        for column, title in BAND_TITLES.items()
    ]
    layout = layout_pb2.Layout()
    layout.CopyFrom(known)
    layout.category.append(layout_pb2.Category(title=name, chart=charts))
    return Summary.Value(
        tag=TAG,
        metadata=SummaryMetadata(
            plugin_data=SummaryMetadata.PluginData(plugin_name="custom_scalars"), data_class=DATA_CLASS_TENSOR
        ),
        tensor=TensorProto(
            dtype=types_pb2.DT_STRING, string_val=[layout.SerializeToString()], tensor_shape=TensorShapeProto()
        ),
    )
