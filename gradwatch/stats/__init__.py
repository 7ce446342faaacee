"""Pure numeric kernels: tensors in, tensors out. Nothing is read back from a device, hooked or logged."""

from __future__ import annotations

from ._attention import apart, attention_bound, attention_peaks, attention_sums
from ._cadence import is_due, next_due
from ._counting import num_beyond
from ._details import GradientDetails, gradient_details
from ._device import forget_layouts, kernel_backends, kernel_faults
from ._exchange import Exchange
from ._exponents import exponent_histograms
from ._gradients import Gradients
from ._measure import GradientMeasures, GradientPieces, measure_gradients, measure_pieces
from ._moments import MOMENTS, extent, host_extent, host_moments, moments, num_nonfinite
from ._native import moments_in_passing
from ._norms import Row, global_norm, host_norms, second_look, tensor_norms
from ._shards import Shards, is_whole, reduce_max_, reduce_sum_
from ._spread import row_spread
from ._statistic import ALONE, GIVEN, OF_CALLS, At, Number, Ranks, Statistic, View
from ._tasks import cosines, gramian
from ._updates import UpdateMeter, UpdateStats

__all__ = [
    "ALONE",
    "GIVEN",
    "MOMENTS",
    "OF_CALLS",
    "At",
    "Exchange",
    "GradientDetails",
    "GradientMeasures",
    "GradientPieces",
    "Gradients",
    "Number",
    "Ranks",
    "Row",
    "Shards",
    "Statistic",
    "UpdateMeter",
    "UpdateStats",
    "View",
    "apart",
    "attention_bound",
    "attention_peaks",
    "attention_sums",
    "cosines",
    "exponent_histograms",
    "extent",
    "global_norm",
    "gradient_details",
    "gramian",
    "host_extent",
    "host_moments",
    "host_norms",
    "forget_layouts",
    "is_due",
    "is_whole",
    "kernel_backends",
    "kernel_faults",
    "measure_gradients",
    "measure_pieces",
    "moments",
    "moments_in_passing",
    "next_due",
    "num_beyond",
    "num_nonfinite",
    "reduce_max_",
    "reduce_sum_",
    "row_spread",
    "second_look",
    "tensor_norms",
]
