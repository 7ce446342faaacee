"""The layout of the Custom Scalars dashboard: bands over layers, for those without the GradWatch tab."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from ...records import StepRecord
from .._headline import newest, weights
from ._values import scalar

__all__ = ["band_values", "write_layout"]

BANDS = {
    "grad_norm": "Gradient norm of the layers",
    "update_ratio": "Update / weight of the layers",
    "output_rms": "Activation RMS of the layers",
}
QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


def band_values(name: str, window: Sequence[StepRecord]) -> list[Any]:
    """Return the quantiles over layers of what the window measured; nan counts as the largest of all."""
    values = []
    for column in BANDS:
        record = newest(window, column)
        if record is None:
            continue
        modules = record.measured(column) & record.index.is_module
        layers = np.sort(record.columns[column][modules] if modules.any() else weights(record, column))
        if len(layers):
            # The nearest one, not between two of them: inf minus inf is nan.
            values += [
                scalar(f"{name}_bands/{column}/{q}", float(layers[round(share * (len(layers) - 1))]))
                for q, share in QUANTILES.items()
            ]
    return values


def write_layout(name: str, log_dir: str) -> None:
    """Write the layout once into the sub-run `<log_dir>/<name>`, where it merges with a layout of the user's own.

    A second layout in one run would replace the first, and a second live event file in one directory stops
    TensorBoard's Python loader on the first; so this file is closed at once.
    """
    folder = f"{log_dir}/{name}"
    if "://" not in folder and any(Path(folder).glob("*tfevents*")):
        return
    writer = EventFileWriter(folder)
    try:
        writer.add_event(Event(summary=Summary(value=[_layout_value(name)])))
    finally:
        writer.close()


def _layout_value(name: str) -> Any:
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
        for column, title in BANDS.items()
    ]
    layout = layout_pb2.Layout(category=[layout_pb2.Category(title=name, chart=charts)])
    return Summary.Value(
        tag="custom_scalars__config__",
        metadata=SummaryMetadata(
            plugin_data=SummaryMetadata.PluginData(plugin_name="custom_scalars"), data_class=DATA_CLASS_TENSOR
        ),
        tensor=TensorProto(
            dtype=types_pb2.DT_STRING, string_val=[layout.SerializeToString()], tensor_shape=TensorShapeProto()
        ),
    )
