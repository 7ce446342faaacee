"""What gradwatch measures beside norms, gradients' details and modules: one file each, listed here."""

from __future__ import annotations

from ._configured import Settings
from ._fingerprints import Fingerprints
from ._local_norms import LocalNorms
from ._measurement import Measurement
from ._model_meter import ModelMeter
from ._noise_scale import NoiseScale
from ._rank_spread import RankSpread
from ._recomputation import Recomputation
from ._replicas import Replicas
from ._row_spread import RowSpread
from ._updates import Updates

__all__ = ["MEASUREMENTS", "measurements"]

MEASUREMENTS: tuple[type[Measurement], ...] = (
    Updates,
    LocalNorms,
    NoiseScale,
    Recomputation,
    Replicas,
    Fingerprints,
    RankSpread,
    RowSpread,
    Settings,
)
"""In the order in which they measure, and their tables travel: one on all ranks."""


def measurements(meter: ModelMeter) -> tuple[Measurement, ...]:
    """Return those that the options ask for."""
    return tuple(kind(meter) for kind in MEASUREMENTS if kind.is_on(meter.options))
